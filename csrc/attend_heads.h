// What token_scores and frozen_attention share: softmax attention of all heads, in parallel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "kernels/table.h"

namespace fpt {

using torch::stable::Tensor;

struct Attention {
  Tensor q;                          // [B, H, Q, D]
  Tensor k;                          // [B, H, N, D]
  std::optional<Tensor> v;           // [B, H, N, D], where `out` is wanted
  std::optional<Tensor> known_lse;   // [B, H, Q] f32, contiguous
  std::optional<Tensor> out;         // [B, Q, H, D]
  std::optional<Tensor> scores;      // [B, H, N] f32: means of the map over the queries
  std::optional<Tensor> lse;         // [B, H, Q] f32
  int64_t queries;                   // the first Q of q
};

// Fills `out`, `scores` and `lse`, as far as they are there.
void attend_heads(const Attention& task, Kind kind, const Kernels& kernels);

}  // namespace fpt
