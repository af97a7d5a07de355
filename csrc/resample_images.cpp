// resample_images: augmented side inputs out of shrunk images, by kernels/resample_images.h.
//
// In the calling thread alone: it is one of a loader's, and the others are at work.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"

namespace fpt {
namespace {

constexpr int64_t CHANNELS = 3, TONES = 4;

// A contiguous tensor of the CPU.
template <class T>
const T* values_of(const char* name, const Tensor& tensor, ScalarType dtype, const Sizes& sizes) {
  check_cpu(name, tensor);
  check_sizes(name, tensor, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
                  " must be contiguous and of dtype ", static_cast<int>(dtype), ", got dtype ",
                  static_cast<int>(tensor.scalar_type()),
                  tensor.is_contiguous() ? "" : ", not contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

void check_all(const char* name, const int64_t* index, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < size, name, " must be in 0..", size - 1, ", got ",
                    index[i]);
}

// Taps of one image [columns, taps] -> [taps, padded], zeros behind the last column.
struct ColumnTaps {
  std::vector<int32_t> index;
  std::vector<float> weight;

  void turn(const int64_t* from, const float* weights, int64_t columns, int64_t taps,
            int64_t padded) {
    index.assign(taps * padded, 0);
    weight.assign(taps * padded, 0.0f);
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t tap = 0; tap < taps; ++tap) {
        index[tap * padded + column] = int32_t(from[column * taps + tap]);
        weight[tap * padded + column] = weights[column * taps + tap];
      }
  }
};

}  // namespace

Tensor resample_images(
    Tensor levels, Tensor rows, Tensor tones, Tensor row_index, Tensor row_weight,
    Tensor column_index, Tensor column_weight, Tensor normalisation, std::string level) {
  const bool is_deep = levels.scalar_type() == ScalarType::UInt16;
  const auto* from = values_of<char>("levels", levels, is_deep ? ScalarType::UInt16 : ScalarType::Byte,
                                     {-1, CHANNELS, -1, -1});
  const int64_t stored = levels.size(0), height = levels.size(2), width = levels.size(3);
  const auto* picked = values_of<int64_t>("rows", rows, ScalarType::Long, {-1});
  const int64_t images = rows.size(0);
  const auto* tone = values_of<float>("tones", tones, ScalarType::Float, {TONES, images});
  const auto* down = values_of<int64_t>("row_index", row_index, ScalarType::Long, {images, -1, -1});
  const auto* across =
      values_of<int64_t>("column_index", column_index, ScalarType::Long, {images, -1, -1});
  const int64_t made_rows = row_index.size(1), row_taps = row_index.size(2);
  const int64_t made_columns = column_index.size(1), column_taps = column_index.size(2);
  const auto* down_weight = values_of<float>("row_weight", row_weight, ScalarType::Float,
                                             {images, made_rows, row_taps});
  const auto* across_weight = values_of<float>("column_weight", column_weight, ScalarType::Float,
                                               {images, made_columns, column_taps});
  const auto* norm =
      values_of<float>("normalisation", normalisation, ScalarType::Float, {2, CHANNELS});
  check_all("rows", picked, images, stored);
  check_all("row_index", down, images * made_rows * row_taps, height);
  check_all("column_index", across, images * made_columns * column_taps, width);
  STD_TORCH_CHECK(width <= INT32_MAX, "levels must have at most 2^31 - 1 columns, got ", width);

  Tensor out = torch::stable::empty({images, CHANNELS, made_rows, made_columns}, ScalarType::Float);
  const Kernels& kernels = kernels_for(level);
  const int64_t padded = (made_columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  ColumnTaps taps;
  ResampleTask task{};
  task.is_deep = is_deep;
  task.height = height, task.width = width;
  task.rows = made_rows, task.columns = made_columns;
  task.row_taps = row_taps, task.column_taps = column_taps;
  std::vector<float> scratch(kernels.resample_scratch(task));
  task.scratch = scratch.data();
  task.out = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t image = 0; image < images; ++image) {
    const int64_t at = image * made_columns * column_taps;
    taps.turn(across + at, across_weight + at, made_columns, column_taps, padded);
    task.column_index = taps.index.data(), task.column_weight = taps.weight.data();
    task.row_index = down + image * made_rows * row_taps;
    task.row_weight = down_weight + image * made_rows * row_taps;
    task.scale = tone[image], task.shift = tone[images + image];
    task.low = tone[2 * images + image], task.high = tone[3 * images + image];
    for (int64_t c = 0; c < CHANNELS; ++c, task.out += made_rows * made_columns) {
      task.levels = from + (picked[image] * CHANNELS + c) * height * width * (is_deep ? 2 : 1);
      task.out_scale = norm[c], task.out_shift = norm[CHANNELS + c];
      kernels.resample_image(task);
    }
  }
  return out;
}

}  // namespace fpt
