// trained_linear, forward and backward, by the kernels of kernels/trained_linear.h.
//
// Threads share out rows, and of the weights' gradient columns; every element is one sum in one order,
// whoever computes it.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "ops.h"
#include "trained_map.h"

namespace fpt {
namespace {

using namespace trained;

constexpr int64_t TURNED = 4;  // groups of rows that are worth a thread where they are only turned

const Kernels& narrow_kernels(const std::string& level) {
  const Kernels& kernels = kernels_for(level);
  STD_TORCH_CHECK(kernels.trained_pack, "trained_linear needs level amx or avx512_bf16, of ",
                  levels());
  return kernels;
}

// Of rows that are added to x, the one that belongs to each of x's: of an axis that has one, all alike.
std::vector<int64_t> added_rows(const Map& map, const Map& added) {
  const size_t axes = map.output.size() - 1;
  Axes found{Sizes(map.output.begin(), map.output.end() - 1), Sizes(axes, 0)};
  bool same = added.output.size() == map.output.size();
  for (int64_t axis = int64_t(axes) - 1, stride = 1; same && axis >= 0; --axis) {
    const int64_t size = added.output[axis];
    same = size == 1 || size == map.output[axis];
    found.strides[axis] = size == 1 ? 0 : stride;
    stride *= size;
  }
  STD_TORCH_CHECK(same, "added must have the axes of x, or 1 in their place, got ",
                  text_of(added.output.data(), axes), " and ", text_of(map.output.data(), axes));
  return places(found);
}

// Every thread's share of a map's groups of rows, by kernels that take a scratch of so many elements.
template <class Work>
void by_groups(const Map& map, int64_t scratch_size, const Work& work) {
  torch::stable::parallel_for(0, map.groups(), 1, [&](int64_t begin, int64_t end) {
    const Elements scratch(scratch_size);
    for (int64_t group = begin; group < end; ++group)
      work(group * AT_ONCE, map.in_group(group), scratch.data());
  });
}

void multiply(const Kernels& kernels, const Map& map, const Elements& packed, const float* bias,
              float* to) {
  by_groups(map, map.needs(kernels).forward_scratch,
            [&](int64_t first, int64_t count, uint16_t* scratch) {
              kernels.trained_forward(map.x, first, count, packed.data(), bias, false, map.columns,
                                      to + first * map.columns, scratch);
            });
}

void multiply_back(const Kernels& kernels, const Map& map, const float* grad, const Elements& packed,
                   const Tensor& grad_x) {
  char* to = static_cast<char*>(grad_x.mutable_data_ptr());
  const int64_t bytes = map.depth * (map.x.narrow ? 2 : 4);
  by_groups(map, map.needs(kernels).input_scratch,
            [&](int64_t first, int64_t count, uint16_t* scratch) {
              kernels.trained_input(grad + first * map.columns, count, map.columns, packed.data(),
                                    map.depth, map.x.narrow, to + first * bytes, scratch);
            });
}

// The output's gradient, turned, and its sum over all rows.
Elements turn(const Kernels& kernels, const Map& map, const float* grad, float* sum) {
  Elements turned(map.needs(kernels).turned);
  std::vector<float> sums(map.groups() * map.columns);  // of the groups' rows
  torch::stable::parallel_for(0, map.groups(), TURNED, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      kernels.trained_turn(grad, map.rows, map.columns, group * AT_ONCE, AT_ONCE, turned.data(),
                           sums.data() + group * map.columns);
  });
  std::fill_n(sum, map.columns, 0.0f);
  for (auto part = sums.begin(); part != sums.end(); part += map.columns)
    for (int64_t i = 0; i < map.columns; ++i) sum[i] += part[i];
  return turned;
}

// A map, and its output's gradient turned.
struct Factor {
  const Map& map;
  const Elements& turned;
};

void multiply_weights(const Kernels& kernels, const std::vector<Factor>& factors, float* grad) {
  const Map& first_map = factors[0].map;
  const int64_t runs = first_map.x.runs, parts = (runs + RUNS - 1) / RUNS;
  int64_t scratch_size = 0;
  for (const Factor& factor : factors)
    scratch_size = std::max(scratch_size, factor.map.needs(kernels).weight_scratch);
  if (!first_map.rows) std::fill_n(grad, first_map.columns * first_map.depth, 0.0f);
  torch::stable::parallel_for(0, first_map.rows ? parts : 0, 1, [&](int64_t begin, int64_t end) {
    const Elements scratch(scratch_size);
    for (int64_t part = begin; part < end; ++part)
      for (size_t i = 0; i < factors.size(); ++i) {
        const auto& [map, turned] = factors[i];
        const int64_t first = part * RUNS, count = std::min(RUNS, runs - first);
        kernels.trained_weight(map.x, turned.data(), map.rows, map.columns, first, count, i > 0,
                               grad, scratch.data());
      }
  });
}

// Sums of the rows of `grad` that one row was added to, in their order.
void sum_added(const float* grad, const std::vector<int64_t>& row_of, int64_t columns, int64_t rows,
               float* to) {
  torch::stable::parallel_for(0, columns / RUN, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * RUN, count = (end - begin) * RUN;
    for (int64_t row = 0; row < rows; ++row) std::fill_n(to + row * columns + first, count, 0.0f);
    for (size_t row = 0; row < row_of.size(); ++row) {
      const float* from = grad + int64_t(row) * columns + first;
      float* sum = to + row_of[row] * columns + first;
      for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
    }
  });
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Elements pack(const Kernels& kernels, const Map& map, bool backward) {
  Elements packed(backward ? map.needs(kernels).backward : map.needs(kernels).forward);
  kernels.trained_pack(map.weight, map.depth, map.columns, backward, packed.data());
  return packed;
}

}  // namespace

Tensor trained_linear(Tensor x, Tensor weight, std::optional<Tensor> bias,
                      std::optional<Tensor> added, std::string level) {
  const Kernels& kernels = narrow_kernels(level);
  const Map map("x", x, weight);
  const float* start = bias ? f32_of("bias", *bias, {map.columns}) : nullptr;
  Tensor out = torch::stable::empty(map.output, ScalarType::Float);
  float* to = floats_of(out);
  const Elements packed = pack(kernels, map, false);
  if (!added) {
    multiply(kernels, map, packed, start, to);
    return out;
  }
  const Map rows("added", *added, weight);
  const std::vector<int64_t> row_of = added_rows(map, rows);
  const Tensor starts = torch::stable::empty({rows.rows, map.columns}, ScalarType::Float);
  multiply(kernels, rows, packed, start, floats_of(starts));
  by_groups(map, map.needs(kernels).forward_scratch,
            [&](int64_t first, int64_t count, uint16_t* scratch) {
              float* at = to + first * map.columns;
              for (int64_t row = 0; row < count; ++row)
                std::copy_n(floats_of(starts) + row_of[first + row] * map.columns, map.columns,
                            at + row * map.columns);
              kernels.trained_forward(map.x, first, count, packed.data(), nullptr, true,
                                      map.columns, at, scratch);
            });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> trained_linear_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> added, bool need_x,
    std::string level) {
  const Kernels& kernels = narrow_kernels(level);
  const Map map("x", x, weight);
  const float* given = f32_of("grad", grad, map.output);
  const auto empty_like = [](const Tensor& tensor, bool is_needed) {
    const Sizes sizes(tensor.sizes().begin(), tensor.sizes().end());
    return torch::stable::empty(is_needed ? sizes : Sizes{0}, tensor.scalar_type());
  };
  Tensor grad_x = empty_like(x, need_x);
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = torch::stable::empty({map.columns}, ScalarType::Float);
  Tensor grad_added = added ? empty_like(*added, true) : torch::stable::empty({0}, ScalarType::Float);
  std::optional<Elements> packed;
  if (need_x || added) packed = pack(kernels, map, true);
  if (need_x) multiply_back(kernels, map, given, *packed, grad_x);
  const Elements turned = turn(kernels, map, given, floats_of(grad_bias));
  if (!added) {
    multiply_weights(kernels, {{map, turned}}, floats_of(grad_weight));
    return {grad_x, grad_weight, grad_bias, grad_added};
  }
  const Map rows("added", *added, weight);
  const Tensor sums = torch::stable::empty({rows.rows, map.columns}, ScalarType::Float);
  sum_added(given, added_rows(map, rows), map.columns, rows.rows, floats_of(sums));
  multiply_back(kernels, rows, floats_of(sums), *packed, grad_added);
  const Tensor whole = torch::stable::empty({map.columns}, ScalarType::Float);  // grad_bias again
  const Elements turned_sums = turn(kernels, rows, floats_of(sums), floats_of(whole));
  multiply_weights(kernels, {{map, turned}, {rows, turned_sums}}, floats_of(grad_weight));
  return {grad_x, grad_weight, grad_bias, grad_added};
}

}  // namespace fpt
