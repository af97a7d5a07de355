// frozen_attention: output, token scores and row log-sum-exp from one product of q and k.

#include <torch/csrc/stable/ops.h>

#include "attend_heads.h"
#include "checks.h"
#include "levels.h"
#include "ops.h"

namespace fpt {

// out [B, N, H, D], scores [B, H, N] f32, lse [B, H, N] f32; empty where it is not needed.
std::tuple<Tensor, Tensor, Tensor> frozen_attention(
    Tensor q, Tensor k, Tensor v, bool need_output, bool need_scores, std::string level) {
  const Kind kind = check_narrow_floats("q", q, {-1, -1, -1, -1});
  const int64_t images = q.size(0), heads = q.size(1), tokens = q.size(2), width = q.size(3);
  for (const auto& [name, tensor] : {std::pair("k", k), std::pair("v", v)})
    STD_TORCH_CHECK(check_floats(name, tensor, {images, heads, tokens, width}) == kind, name,
                    " must have the dtype of q");
  Tensor out = torch::stable::empty({need_output ? images : 0, tokens, heads, width},
                                    q.scalar_type());
  Tensor scores = torch::stable::empty({need_scores ? images : 0, heads, tokens},
                                       ScalarType::Float);
  Tensor lse = torch::stable::empty({images, heads, tokens}, ScalarType::Float);
  Attention task{q, k, {}, {}, {}, {}, lse, tokens};
  if (need_output) task.v = v, task.out = out;
  if (need_scores) task.scores = scores;
  attend_heads(task, kind, kernels_for(level));
  return {out, scores, lse};
}

}  // namespace fpt
