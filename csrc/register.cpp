// The one file that registers.  `level` names a level of kernels, and is empty for the best one.
// Schemas for users, fakes and gradients are in python/fpt_fast/ops/library.py.

#include <torch/csrc/stable/library.h>

#include "levels.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(fpt_native, m) {
  m.def("levels() -> str");
  m.def(
      "select_tokens(Tensor scores, Tensor k, Tensor v, int keep, ScalarType dtype, str level)"
      " -> (Tensor kv, Tensor index)");
  m.def("token_scores(Tensor q, Tensor k, bool class_token, Tensor? lse, str level) -> Tensor");
  m.def(
      "frozen_attention(Tensor q, Tensor k, Tensor v, bool need_output, bool need_scores, str level)"
      " -> (Tensor out, Tensor scores, Tensor lse)");
  m.def(
      "prompt_attention(Tensor q, Tensor kv, Tensor? rows, Tensor? k_scales, Tensor? v_scales,"
      " str level) -> (Tensor out, Tensor lse)");
  m.def(
      "prompt_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor lse, Tensor? rows,"
      " Tensor? k_scales, Tensor? v_scales, str level) -> Tensor");
  m.def(
      "prompt_attention_indexed(Tensor q, Tensor k, Tensor v, Tensor index, str level)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "prompt_attention_indexed_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index,"
      " Tensor lse, str level) -> Tensor");
  m.def(
      "read_records(Tensor places, Tensor mapped, Tensor(a!) kv, Tensor(b!) k_scales,"
      " Tensor(c!) v_scales,"
      " Tensor(d!) index, int record_bytes, bool digests, int threads, str level)"
      " -> (Tensor counts, Tensor digests)");
  m.def(
      "resample_images(Tensor levels, Tensor rows, Tensor tones, Tensor row_index,"
      " Tensor row_weight, Tensor column_index, Tensor column_weight, Tensor normalisation,"
      " str level) -> Tensor");
  m.def("side_attention(Tensor q, Tensor k, Tensor v, str level) -> (Tensor out, Tensor softmax)");
  m.def(
      "side_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor softmax, str level) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "frozen_linear(Tensor x, Tensor weight, Tensor? bias, bool gelu, Tensor? residual,"
      " Tensor? scale, str level) -> Tensor");
  m.def(
      "clipped_adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!) means,"
      " Tensor(c!) squares, Tensor(d!) steps, float rate, float beta1, float beta2, float eps,"
      " float decay, bool decoupled, float clip_norm, str level) -> Tensor");
  m.def("trained_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? added, str level) -> Tensor");
  m.def(
      "trained_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? added, bool need_x,"
      " str level) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_added)");
  m.def(
      "side_layers(Tensor tokens, Tensor states, Tensor[] weights, int heads, int queries, float eps,"
      " bool narrow, str level) -> (Tensor out, Tensor[] kept)");
  m.def(
      "side_layers_backward(Tensor grad, Tensor tokens, Tensor states, Tensor[] weights,"
      " Tensor[] kept, int heads, int queries, float eps, bool narrow, str level)"
      " -> (Tensor grad_tokens, Tensor grad_states, Tensor[] gradients)");
}

STABLE_TORCH_LIBRARY_IMPL(fpt_native, CompositeExplicitAutograd, m) {
  m.impl("levels", TORCH_BOX(&fpt::levels));
}

STABLE_TORCH_LIBRARY_IMPL(fpt_native, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&fpt::select_tokens));
  m.impl("token_scores", TORCH_BOX(&fpt::token_scores));
  m.impl("frozen_attention", TORCH_BOX(&fpt::frozen_attention));
  m.impl("prompt_attention", TORCH_BOX(&fpt::prompt_attention));
  m.impl("prompt_attention_backward", TORCH_BOX(&fpt::prompt_attention_backward));
  m.impl("prompt_attention_indexed", TORCH_BOX(&fpt::prompt_attention_indexed));
  m.impl(
      "prompt_attention_indexed_backward", TORCH_BOX(&fpt::prompt_attention_indexed_backward));
  m.impl("read_records", TORCH_BOX(&fpt::read_records));
  m.impl("resample_images", TORCH_BOX(&fpt::resample_images));
  m.impl("side_attention", TORCH_BOX(&fpt::side_attention));
  m.impl("side_attention_backward", TORCH_BOX(&fpt::side_attention_backward));
  m.impl("frozen_linear", TORCH_BOX(&fpt::frozen_linear));
  m.impl("clipped_adam", TORCH_BOX(&fpt::clipped_adam));
  m.impl("trained_linear", TORCH_BOX(&fpt::trained_linear));
  m.impl("trained_linear_backward", TORCH_BOX(&fpt::trained_linear_backward));
  m.impl("side_layers", TORCH_BOX(&fpt::side_layers));
  m.impl("side_layers_backward", TORCH_BOX(&fpt::side_layers_backward));
}
