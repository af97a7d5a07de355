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

struct Axes {
  Sizes sizes, strides;
};

// From the first element to every one of these axes, with `every` of the last, in their order.
std::vector<int64_t> places(const Axes& axes, int64_t every = 1) {
  std::vector<int64_t> found = {0};
  const size_t count = axes.sizes.size();
  for (size_t axis = 0; axis < count; ++axis) {
    const int64_t step = axis + 1 == count ? every : 1;
    std::vector<int64_t> finer;
    for (const int64_t place : found)
      for (int64_t i = 0; i < axes.sizes[axis]; i += step)
        finer.push_back(place + i * axes.strides[axis]);
    found.swap(finer);
  }
  return found;
}

// Axes first .. end of a tensor, in bytes.
Axes axes_of(const Tensor& x, int64_t first, int64_t end, int64_t bytes) {
  Axes axes;
  for (int64_t axis = first; axis < end; ++axis) {
    axes.sizes.push_back(x.size(axis));
    axes.strides.push_back(x.stride(axis) * bytes);
  }
  return axes;
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

  Map(const char* name, const Tensor& input, const Tensor& weights) {
    const Kind kind = check_narrow_floats(name, input, Sizes(input.dim(), -1));
    STD_TORCH_CHECK(kind != Kind::f16, name, " must be bfloat16 or float32, got float16");
    STD_TORCH_CHECK(weights.dim() >= 2 && input.dim() >= weights.dim() - 1, name,
                    " must have the axes of weight behind its first, got ", input.dim(), " and ",
                    weights.dim());
    weight = f32_of("weight", weights, Sizes(weights.dim(), -1));
    const int64_t axes = weights.dim() - 1, first = input.dim() - axes, last = input.dim() - 1;
    columns = weights.size(0), depth = 1;
    for (int64_t axis = 0; axis < axes; ++axis) {
      STD_TORCH_CHECK(input.size(first + axis) == weights.size(1 + axis), name, " must have size ",
                      weights.size(1 + axis), " like weight along axis ", first + axis, ", got ",
                      input.size(first + axis));
      depth *= weights.size(1 + axis);
    }
    STD_TORCH_CHECK(input.stride(last) == 1 && input.size(last) % RUN == 0 && depth % 32 == 0 &&
                        depth > 0 && columns % RUN == 0,
                    name, " must have stride 1 and a multiple of ", RUN, " values along its last axis, of ",
                    "depth and columns that 32 and ", RUN, " divide, got ", input.size(last), ", ",
                    depth, " and ", columns);
    const int64_t bytes = bytes_of(kind);
    row = places(axes_of(input, 0, first, bytes));
    run = places(axes_of(input, first, input.dim(), bytes), RUN);
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

// A map, the output's gradient turned, and whether another's was before it.
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
  const TrainedNeeds needs = map.needs(kernels);
  Elements packed(backward ? needs.backward : needs.forward);
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
