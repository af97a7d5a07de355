// trained_linear, forward and backward, by the kernels of kernels/trained_linear.h.
//
// Threads share out rows, and of the weights' gradient columns; every element is one sum in one order,
// whoever computes it.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"

namespace fpt {
namespace {

constexpr int64_t RUN = 16;      // values side by side
constexpr int64_t RUNS = 12;     // of the weights' gradient, whose sums stay in the cache
constexpr int64_t AT_ONCE = 64;  // rows of a product, which stay in the cache with the weights
constexpr int64_t TURNED = 4;    // times as many that are worth a thread where they are only turned

// Scratch of bf16 that begins at a line of the cache, as a row of a tile should, and holds nothing yet.
class Elements {
 public:
  explicit Elements(int64_t count) : held_(new (LINE) uint16_t[count]) {}
  uint16_t* data() const { return held_.get(); }

 private:
  static constexpr std::align_val_t LINE{64};
  struct Free {
    void operator()(uint16_t* held) const { ::operator delete[](held, LINE); }
  };
  std::unique_ptr<uint16_t[], Free> held_;
};

const Kernels& narrow_kernels(const std::string& level) {
  const Kernels& kernels = kernels_for(level);
  STD_TORCH_CHECK(kernels.trained_pack, "trained_linear needs level amx or avx512_bf16, of ",
                  levels());
  return kernels;
}

const float* f32_of(const char* name, const Tensor& tensor, const Sizes& sizes) {
  STD_TORCH_CHECK(check_floats(name, tensor, sizes) == Kind::f32, name, " must be float32");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Bytes from the first element to every one of these axes, with `every` of the last, in their order.
std::vector<int64_t> places(const Tensor& x, int64_t first, int64_t end, int64_t every,
                            int64_t bytes) {
  std::vector<int64_t> found = {0};
  for (int64_t axis = first; axis < end; ++axis) {
    const int64_t size = x.size(axis), stride = x.stride(axis) * bytes;
    const int64_t step = axis + 1 == end ? every : 1;
    std::vector<int64_t> finer;
    for (const int64_t place : found)
      for (int64_t i = 0; i < size; i += step) finer.push_back(place + i * stride);
    found.swap(finer);
  }
  return found;
}

// What is between neighbours where it is the same for all of them; else 0.
int64_t spacing(const std::vector<int64_t>& places, int64_t single) {
  const int64_t space = places.size() > 1 ? places[1] - places[0] : single;
  for (size_t i = 1; i < places.size(); ++i)
    if (places[i] - places[i - 1] != space) return 0;
  return space;
}

// x [..., K] and weight [O, K] of one K, which may be several axes.
struct Map {
  int64_t rows, depth, columns;
  std::vector<int64_t> row, run, output;  // of the last: sizes
  const float* weight;
  TrainedRows x;

  Map(const Tensor& input, const Tensor& weights) {
    const Kind kind = check_narrow_floats("x", input, Sizes(input.dim(), -1));
    STD_TORCH_CHECK(kind != Kind::f16, "x must be bfloat16 or float32, got float16");
    STD_TORCH_CHECK(weights.dim() >= 2 && input.dim() >= weights.dim() - 1,
                    "x must have the axes of weight behind its first, got ", input.dim(), " and ",
                    weights.dim());
    weight = f32_of("weight", weights, Sizes(weights.dim(), -1));
    const int64_t axes = weights.dim() - 1, first = input.dim() - axes, last = input.dim() - 1;
    columns = weights.size(0), depth = 1;
    for (int64_t axis = 0; axis < axes; ++axis) {
      STD_TORCH_CHECK(input.size(first + axis) == weights.size(1 + axis), "x must have size ",
                      weights.size(1 + axis), " like weight along axis ", first + axis, ", got ",
                      input.size(first + axis));
      depth *= weights.size(1 + axis);
    }
    STD_TORCH_CHECK(input.stride(last) == 1 && input.size(last) % RUN == 0 && depth % 32 == 0 &&
                        depth > 0 && columns % RUN == 0,
                    "x must have stride 1 and a multiple of ", RUN, " values along its last axis, of ",
                    "depth and columns that 32 and ", RUN, " divide, got ", input.size(last), ", ",
                    depth, " and ", columns);
    const int64_t bytes = bytes_of(kind);
    row = places(input, 0, first, 1, bytes);
    run = places(input, first, input.dim(), RUN, bytes);
    rows = int64_t(row.size());
    for (int64_t axis = 0; axis < first; ++axis) output.push_back(input.size(axis));
    output.push_back(columns);
    const bool narrow = kind == Kind::bf16;
    const bool are_whole = narrow && spacing(run, 2 * RUN) == 2 * RUN;
    x = {static_cast<const char*>(input.const_data_ptr()), row.data(), run.data(),
         int64_t(run.size()), narrow, are_whole ? spacing(row, 2 * depth) / 2 : 0};
  }

  TrainedNeeds needs(const Kernels& kernels) const {
    return kernels.trained_needs(rows, depth, columns, AT_ONCE, std::min(RUNS, x.runs));
  }
  int64_t groups() const { return (rows + AT_ONCE - 1) / AT_ONCE; }
  int64_t in_group(int64_t group) const { return std::min(AT_ONCE, rows - group * AT_ONCE); }
};

// Sums of rows of parts, which are few.
void sum_rows(const std::vector<float>& parts, int64_t columns, float* to) {
  std::fill_n(to, columns, 0.0f);
  for (auto part = parts.begin(); part != parts.end(); part += columns)
    for (int64_t i = 0; i < columns; ++i) to[i] += part[i];
}

}  // namespace

Tensor trained_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string level) {
  const Kernels& kernels = narrow_kernels(level);
  const Map map(x, weight);
  const float* added = bias ? f32_of("bias", *bias, {map.columns}) : nullptr;
  Tensor out = torch::stable::empty(map.output, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const TrainedNeeds needs = map.needs(kernels);
  Elements packed(needs.forward);
  kernels.trained_pack(map.weight, map.depth, map.columns, false, packed.data());
  torch::stable::parallel_for(0, map.groups(), 1, [&](int64_t begin, int64_t end) {
    Elements scratch(needs.forward_scratch);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * AT_ONCE;
      kernels.trained_forward(map.x, first, map.in_group(group), packed.data(), added, map.columns,
                              to + first * map.columns, scratch.data());
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> trained_linear_backward(
    Tensor grad, Tensor x, Tensor weight, bool need_x, std::string level) {
  const Kernels& kernels = narrow_kernels(level);
  const Map map(x, weight);
  const float* given = f32_of("grad", grad, map.output);
  const Sizes sizes(x.sizes().begin(), x.sizes().end());
  Tensor grad_x = torch::stable::empty(need_x ? sizes : Sizes{0}, x.scalar_type());
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = torch::stable::empty({map.columns}, ScalarType::Float);
  const TrainedNeeds needs = map.needs(kernels);
  if (need_x) {
    Elements packed(needs.backward);
    kernels.trained_pack(map.weight, map.depth, map.columns, true, packed.data());
    char* to = static_cast<char*>(grad_x.mutable_data_ptr());
    const int64_t bytes = map.depth * (map.x.narrow ? 2 : 4);
    torch::stable::parallel_for(0, map.groups(), 1, [&](int64_t begin, int64_t end) {
      Elements scratch(needs.input_scratch);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * AT_ONCE;
        kernels.trained_input(given + first * map.columns, map.in_group(group), map.columns,
                              packed.data(), map.depth, map.x.narrow, to + first * bytes,
                              scratch.data());
      }
    });
  }
  Elements turned(needs.turned);
  std::vector<float> sums(map.groups() * map.columns);  // of the groups' rows
  torch::stable::parallel_for(0, map.groups(), TURNED, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      kernels.trained_turn(given, map.rows, map.columns, group * AT_ONCE, AT_ONCE, turned.data(),
                           sums.data() + group * map.columns);
  });
  sum_rows(sums, map.columns, static_cast<float*>(grad_bias.mutable_data_ptr()));
  auto* weights = static_cast<float*>(grad_weight.mutable_data_ptr());
  if (!map.rows) std::fill_n(weights, map.columns * map.depth, 0.0f);
  const int64_t parts = (map.x.runs + RUNS - 1) / RUNS;
  torch::stable::parallel_for(0, map.rows ? parts : 0, 1, [&](int64_t begin, int64_t end) {
    Elements scratch(needs.weight_scratch);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * RUNS;
      kernels.trained_weight(map.x, turned.data(), map.rows, map.columns, first,
                             std::min(RUNS, map.x.runs - first), weights, scratch.data());
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fpt
