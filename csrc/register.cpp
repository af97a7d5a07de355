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
}

STABLE_TORCH_LIBRARY_IMPL(fpt_native, CompositeExplicitAutograd, m) {
  m.impl("levels", TORCH_BOX(&fpt::levels));
}

STABLE_TORCH_LIBRARY_IMPL(fpt_native, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&fpt::select_tokens));
}
