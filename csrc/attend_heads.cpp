#include "attend_heads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "scratch.h"

namespace fpt {

namespace {

// Queries of one head are cut into parts, so that there is work for more threads than heads; how many
// depends on the sizes alone, and so does the order in which sums are added up.
constexpr int64_t PART = 480;
constexpr int64_t MOST_PARTS = 8;

Matrix matrix(const Tensor& tensor, Kind kind, int64_t image, int64_t head, int64_t row) {
  const auto* data = static_cast<const char*>(address(tensor, kind, image, head));
  return {data + row * tensor.stride(2) * bytes_of(kind), tensor.stride(2), tensor.stride(3)};
}

float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

// scores [heads, N] from sums [heads, parts, N] over parts of the queries.
void add_parts(const std::vector<float>& sums, int64_t heads, int64_t parts, int64_t tokens,
               int64_t queries, float* scores) {
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      for (int64_t token = 0; token < tokens; ++token) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part)
          sum += sums[(head * parts + part) * tokens + token];
        scores[head * tokens + token] = float(sum / double(queries));
      }
  });
}

}  // namespace

void attend_heads(const Attention& a, Kind kind, const Kernels& kernels) {
  const int64_t heads = a.k.size(1), tokens = a.k.size(2), width = a.k.size(3);
  const int64_t all_heads = a.k.size(0) * heads, queries = a.queries;
  const int64_t parts = std::min(MOST_PARTS, (queries + PART - 1) / PART);
  std::vector<float> sums(a.scores ? all_heads * parts * tokens : 0);
  const auto task_of = [&](int64_t item) {
    const int64_t head = item / parts, part = item % parts;
    const int64_t first = part * queries / parts, last = (part + 1) * queries / parts;
    AttentionTask task{};
    task.q = matrix(a.q, kind, head / heads, head % heads, first);
    task.k = matrix(a.k, kind, head / heads, head % heads, 0);
    if (a.v) task.v = matrix(*a.v, kind, head / heads, head % heads, 0);
    task.kind = kind;
    task.rows = last - first;
    task.tokens = tokens;
    task.width = width;
    task.scale = float(1.0 / std::sqrt(double(width)));
    if (a.known_lse) task.known_lse = floats(a.known_lse) + head * queries + first;
    if (a.lse) task.lse = floats(a.lse) + head * queries + first;
    if (a.scores) task.columns = sums.data() + item * tokens;
    if (a.out) {
      const int64_t at = ((head / heads * queries + first) * heads + head % heads) * width;
      task.out = static_cast<char*>(a.out->mutable_data_ptr()) + at * bytes_of(kind);
      task.out_stride = heads * width;
    }
    return task;
  };
  torch::stable::parallel_for(0, all_heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch(kernels.attention_scratch(task_of(begin)));
    for (int64_t item = begin; item < end; ++item) {
      AttentionTask task = task_of(item);
      task.scratch = scratch.data();
      if (item == begin || item % parts == 0) kernels.attention_pack(task);
      kernels.attention_rows(task);
    }
  });
  if (a.scores) add_parts(sums, all_heads, parts, tokens, queries, floats(a.scores));
}

}  // namespace fpt
