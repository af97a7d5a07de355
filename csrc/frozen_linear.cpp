// frozen_linear by the kernels of kernels/frozen_linear.h: threads share out the columns, and where
// these are few, the rows too; each element is one sum over the whole depth, whoever computes it.

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "levels.h"
#include "ops.h"
#include "scratch.h"

namespace fpt {
namespace {

constexpr int64_t PANEL_COLUMNS = 32;
// Packed columns that a second-level cache holds beside a strip of rows.
constexpr int64_t PACKED_BYTES = 1 << 20;
// A part of the rows pays for packing the columns once more.
constexpr int64_t FEWEST_ROWS = 256;

void check_bf16(const char* name, const Tensor& tensor, const Sizes& sizes) {
  STD_TORCH_CHECK(check_floats(name, tensor, sizes) == Kind::bf16, name, " must be bfloat16");
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1 || tensor.size(last) <= 1, name,
                  " must have stride 1 along its last axis, got ", tensor.stride(last));
}

const uint16_t* values(const Tensor& tensor) {
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}

const uint16_t* values(const std::optional<Tensor>& tensor) {
  return tensor ? values(*tensor) : nullptr;
}

// Parts of the rows, so that every thread has about as much to do.
int64_t parts_of(int64_t rows, int64_t panels) {
  const int64_t threads = torch::stable::get_num_threads();
  if (panels % threads == 0 || panels >= 8 * threads) return 1;
  const int64_t wanted = (8 * threads + panels - 1) / panels;
  return std::clamp<int64_t>(rows / FEWEST_ROWS, 1, wanted);
}

// Columns panels .. panels + count of rows first .. last of the whole task.
LinearTask part_of(const LinearTask& whole, int64_t first, int64_t last, int64_t panel,
                   int64_t count) {
  const int64_t column = panel * PANEL_COLUMNS;
  LinearTask task = whole;
  task.x += first * task.x_stride;
  task.weight += column * task.weight_stride;
  if (task.bias) task.bias += column;
  if (task.scale) task.scale += column;
  if (task.residual) task.residual += first * task.residual_stride + column;
  task.out += first * task.out_stride + column;
  task.rows = last - first;
  task.columns = count * PANEL_COLUMNS;
  return task;
}

void multiply_all(const LinearTask& whole, const Kernels& kernels) {
  const int64_t panels = whole.columns / PANEL_COLUMNS, parts = parts_of(whole.rows, panels);
  const int64_t at_once =
      std::max<int64_t>(1, PACKED_BYTES / (2 * PANEL_COLUMNS * std::max<int64_t>(whole.depth, 1)));
  torch::stable::parallel_for(0, parts * panels, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = std::min({at_once, panels, end - begin});
    const Scratch<char> scratch(kernels.linear_scratch(whole.depth, most * PANEL_COLUMNS));
    while (begin < end) {
      const int64_t part = begin / panels, panel = begin % panels;
      const int64_t here = std::min(end - begin, panels - panel);
      const int64_t groups = (here + most - 1) / most;
      const int64_t count = (here + groups - 1) / groups;
      LinearTask task = part_of(whole, part * whole.rows / parts, (part + 1) * whole.rows / parts,
                                panel, count);
      task.scratch = scratch.data();
      kernels.linear_columns(task);
      begin += count;
    }
  });
}

}  // namespace

Tensor frozen_linear(
    Tensor x, Tensor weight, std::optional<Tensor> bias, bool gelu, std::optional<Tensor> residual,
    std::optional<Tensor> scale, std::string level) {
  check_bf16("x", x, {-1, -1});
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.dim() ? weight.size(0) : 0;
  check_bf16("weight", weight, {columns, depth});
  STD_TORCH_CHECK(depth % 32 == 0 && columns % 32 == 0 && depth > 0,
                  "weight must have sizes that 32 divides, got ", columns, " x ", depth);
  if (bias) check_bf16("bias", *bias, {columns});
  if (scale) check_bf16("scale", *scale, {columns});
  if (residual) check_bf16("residual", *residual, {rows, columns});
  STD_TORCH_CHECK(!(gelu && residual), "residual must be none with gelu");
  STD_TORCH_CHECK(residual || !scale, "scale must come with a residual");
  const Kernels& kernels = kernels_for(level);
  STD_TORCH_CHECK(kernels.linear_columns, "frozen_linear needs level amx, got ", level);
  Tensor out = torch::stable::empty({rows, columns}, ScalarType::BFloat16);
  if (rows == 0 || columns == 0) return out;
  LinearTask task{};
  task.x = values(x);
  task.x_stride = x.stride(0);
  task.weight = values(weight);
  task.weight_stride = weight.stride(0);
  task.bias = values(bias);
  task.scale = values(scale);
  task.residual = values(residual);
  task.residual_stride = residual ? residual->stride(0) : 0;
  task.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  task.out_stride = columns;
  task.rows = rows;
  task.depth = depth;
  task.columns = columns;
  task.gelu = gelu;
  multiply_all(task, kernels);
  return out;
}

}  // namespace fpt
