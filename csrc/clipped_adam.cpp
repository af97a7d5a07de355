// clipped_adam by the kernels of kernels/clipped_adam.h: the norm of all gradients, then the update.
//
// Both go by pieces of tensors, which depend on the sizes alone, and the pieces' sums are added in
// their order: results are the same from any number of threads.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"

namespace fpt {
namespace {

constexpr int64_t PIECE = 8192;   // floats, so that sums in f32 stay short
constexpr int64_t FEWEST = 65536;  // floats that are worth a thread
constexpr float NORM_EPSILON = 1e-6f;  // of torch.nn.utils.clip_grad_norm_

struct Piece {
  size_t tensor;
  int64_t first, count;
};

// Contiguous f32 on the CPU; names are made only where one is wrong.
float* floats_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float &&
                      tensor.is_contiguous(),
                  name, " must be contiguous float32 on cpu, got dtype ",
                  static_cast<int>(tensor.scalar_type()),
                  tensor.is_contiguous() ? "" : ", not contiguous");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

float* floats_of(const char* name, const Tensor& tensor, int64_t count) {
  check_sizes(name, tensor, {count});
  return floats_of(name, tensor);
}

struct Values {
  float* parameter;
  const float* gradient;
  int64_t start;  // where its moments begin
};

std::vector<Values> values_of(const std::vector<Tensor>& parameters,
                              const std::vector<Tensor>& gradients) {
  STD_TORCH_CHECK(gradients.size() == parameters.size(), "gradients must hold ", parameters.size(),
                  " tensors like parameters, got ", gradients.size());
  std::vector<Values> values;
  int64_t start = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    values.push_back({floats_of("parameters", parameters[i]), floats_of("gradients", gradients[i]),
                      start});
    const auto sizes = parameters[i].sizes();
    check_sizes("gradients", gradients[i], Sizes(sizes.begin(), sizes.end()));
    start += parameters[i].numel();
  }
  return values;
}

std::vector<Piece> pieces_of(const std::vector<Tensor>& tensors) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t count = tensors[i].numel();
    for (int64_t first = 0; first < count; first += PIECE)
      pieces.push_back({i, first, std::min(PIECE, count - first)});
  }
  return pieces;
}

// Pieces for a thread at least: of the average size these are worth it.
int64_t grain_of(const std::vector<Piece>& pieces, int64_t floats) {
  return std::max<int64_t>(1, FEWEST * int64_t(pieces.size()) / std::max<int64_t>(1, floats));
}

double norm_of(const Kernels& kernels, const std::vector<Piece>& pieces,
               const std::vector<Values>& values, int64_t grain) {
  std::vector<float> sums(pieces.size());
  torch::stable::parallel_for(0, pieces.size(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums[i] = kernels.sum_of_squares(values[pieces[i].tensor].gradient + pieces[i].first,
                                       pieces[i].count);
  });
  double sum = 0;
  for (const float part : sums) sum += part;
  return std::sqrt(sum);
}

}  // namespace

Tensor clipped_adam(
    std::vector<Tensor> parameters, std::vector<Tensor> gradients, Tensor means, Tensor squares,
    Tensor steps, double rate, double beta1, double beta2, double eps, double decay, bool decoupled,
    double clip_norm, std::string level) {
  const std::vector<Values> values = values_of(parameters, gradients);
  const int64_t floats =
      values.empty() ? 0 : values.back().start + parameters.back().numel();
  float* mean = floats_of("means", means, floats);
  float* square = floats_of("squares", squares, floats);
  float* made = floats_of("steps", steps, parameters.size());
  const Kernels& kernels = kernels_for(level);
  const std::vector<Piece> pieces = pieces_of(parameters);
  const int64_t grain = grain_of(pieces, floats);
  const float norm = float(norm_of(kernels, pieces, values, grain));

  AdamTask shared{};
  const float ratio = float(clip_norm) / (norm + NORM_EPSILON);
  shared.clip = ratio > 1.0f ? 1.0f : ratio;  // NaN stays, as in torch
  shared.decoupled = decoupled;
  shared.decay = float(decoupled ? rate * decay : decay);
  shared.fresh_mean = float(1 - beta1);
  shared.fresh_square = float(1 - beta2);
  shared.eps = float(eps);
  std::vector<AdamTask> tasks;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const double step = ++made[i];
    AdamTask task = shared;
    task.rate = float(rate / (1 - std::pow(beta1, step)));
    task.correction = float(1 / std::sqrt(1 - std::pow(beta2, step)));
    tasks.push_back(task);
  }
  torch::stable::parallel_for(0, pieces.size(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [tensor, first, count] = pieces[i];
      AdamTask task = tasks[tensor];
      task.parameter = values[tensor].parameter + first;
      task.gradient = values[tensor].gradient + first;
      task.mean = mean + values[tensor].start + first;
      task.square = square + values[tensor].start + first;
      task.count = count;
      kernels.adam_piece(task);
    }
  });
  Tensor out = torch::stable::empty({}, ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = norm;
  return out;
}

}  // namespace fpt
