// token_scores: the attention's weights without its output.

#include <torch/csrc/stable/ops.h>

#include "attend_heads.h"
#include "checks.h"
#include "levels.h"
#include "ops.h"

namespace fpt {

Tensor token_scores(
    Tensor q, Tensor k, bool class_token, std::optional<Tensor> lse, std::string level) {
  const Kind kind = check_narrow_floats("q", q, {-1, -1, -1, -1});
  const int64_t images = q.size(0), heads = q.size(1), tokens = q.size(2);
  STD_TORCH_CHECK(check_floats("k", k, {images, heads, tokens, q.size(3)}) == kind,
                  "k must have the dtype of q");
  Attention task{q, k, {}, {}, {}, {}, {}, class_token ? 1 : tokens};
  if (lse && !class_token) {
    STD_TORCH_CHECK(check_floats("lse", *lse, {images, heads, tokens}) == Kind::f32,
                    "lse must be float32");
    task.known_lse = torch::stable::contiguous(*lse);
  }
  Tensor scores = torch::stable::empty({images, heads, tokens}, ScalarType::Float);
  task.scores = scores;
  attend_heads(task, kind, kernels_for(level));
  return scores;
}

}  // namespace fpt
