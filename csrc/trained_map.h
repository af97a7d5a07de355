// What trained_linear multiplies: rows wherever they are in memory, and the weights.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "scratch.h"

namespace fpt {
namespace trained {

constexpr int64_t RUN = 16;      // values side by side
constexpr int64_t RUNS = 12;     // of the weights' gradient, whose sums stay in the cache
constexpr int64_t AT_ONCE = 64;  // rows of a product, which stay in the cache with the weights

using Elements = Scratch<uint16_t>;  // bf16

inline const float* f32_of(const char* name, const Tensor& tensor, const Sizes& sizes) {
  STD_TORCH_CHECK(check_floats(name, tensor, sizes) == Kind::f32, name, " must be float32");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<const float*>(tensor.const_data_ptr());
}

struct Axes {
  Sizes sizes, strides;
};

// From the first element to every one of these axes, with `every` of the last, in their order.
inline std::vector<int64_t> places(const Axes& axes, int64_t every = 1) {
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
inline Axes axes_of(const Tensor& x, int64_t first, int64_t end, int64_t bytes) {
  Axes axes;
  for (int64_t axis = first; axis < end; ++axis) {
    axes.sizes.push_back(x.size(axis));
    axes.strides.push_back(x.stride(axis) * bytes);
  }
  return axes;
}

// What is between neighbours where it is the same for all of them; else 0.
inline int64_t spacing(const std::vector<int64_t>& places, int64_t single) {
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

}  // namespace trained
}  // namespace fpt
