// side_attention, forward and backward, by the kernels of kernels/side_attention.h: threads share
// out the heads of the images, and each writes its own rows.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"
#include "scratch.h"

namespace fpt {
namespace {

constexpr int64_t WIDEST = 16;

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_f32(const char* name, const Tensor& tensor, const Sizes& sizes) {
  STD_TORCH_CHECK(check_floats(name, tensor, sizes) == Kind::f32, name, " must be float32");
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_f32("q", q, {-1, -1, -1, -1});
  const int64_t width = q.size(3);
  STD_TORCH_CHECK(width >= 1 && width <= WIDEST, "q must have D in 1..", WIDEST, ", got ", width);
  check_f32("k", k, {q.size(0), q.size(1), -1, width});
  check_f32("v", v, {q.size(0), q.size(1), k.size(2), width});
  STD_TORCH_CHECK(k.size(2) >= 1, "k must have at least 1 token, got 0");
}

Matrix head_of(const Tensor& tensor, int64_t image, int64_t head) {
  return {address(tensor, Kind::f32, image, head), tensor.stride(2), tensor.stride(3)};
}

// Runs `use(task, image, head)` for every head, in threads.
template <class Use>
void for_each_head(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& softmax,
                   const Kernels& kernels, Use use) {
  const int64_t heads = q.size(1), units = q.size(0) * heads, queries = q.size(2);
  float* rows = floats_of(softmax);
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const int64_t floats = kernels.side_scratch(queries, k.size(2));
    const Scratch<float> scratch(floats);
    std::fill_n(scratch.data(), floats, 0.0f);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / heads, head = unit % heads;
      use(SideTask{head_of(q, image, head), head_of(k, image, head), head_of(v, image, head),
                   queries, k.size(2), q.size(3), rows + unit * queries,
                   rows + (units + unit) * queries, scratch.data()},
          image, head);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> side_attention(Tensor q, Tensor k, Tensor v, std::string level) {
  check_inputs(q, k, v);
  const Kernels& kernels = kernels_for(level);
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3);
  Tensor out = torch::stable::empty({images, queries, heads, width}, ScalarType::Float);
  Tensor softmax = torch::stable::empty({2, images, heads, queries}, ScalarType::Float);
  float* to = floats_of(out);
  for_each_head(q, k, v, softmax, kernels, [&](const SideTask& task, int64_t image, int64_t head) {
    kernels.side_forward(task, to + (image * queries * heads + head) * width, heads * width);
  });
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor> side_attention_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, std::string level) {
  check_inputs(q, k, v);
  const Kernels& kernels = kernels_for(level);
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3);
  check_f32("grad", grad, {images, heads, queries, width});
  check_f32("out", out, {images, heads, queries, width});
  check_f32("softmax", softmax, {2, images, heads, queries});
  STD_TORCH_CHECK(softmax.is_contiguous(), "softmax must be contiguous");
  Tensor grad_q = torch::stable::empty({images, queries, heads, width}, ScalarType::Float);
  Tensor grad_k = torch::stable::empty({images, k.size(2), heads, width}, ScalarType::Float);
  Tensor grad_v = torch::stable::empty({images, k.size(2), heads, width}, ScalarType::Float);
  float *to_q = floats_of(grad_q), *to_k = floats_of(grad_k), *to_v = floats_of(grad_v);
  for_each_head(q, k, v, softmax, kernels, [&](const SideTask& task, int64_t image, int64_t head) {
    const int64_t query = (image * queries * heads + head) * width;
    const int64_t key = (image * task.tokens * heads + head) * width;
    kernels.side_backward(task, {head_of(grad, image, head), head_of(out, image, head),
                                 to_q + query, to_k + key, to_v + key, heads * width});
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace fpt
