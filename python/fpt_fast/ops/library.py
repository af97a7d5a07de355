"""The ops as ``torch.library`` knows them, and who implements them.

``frozen_schemas.py`` and ``trained_schemas.py`` hold schemas, fakes and gradients.  An op's body
looks at values that tracing cannot see (NaN, index ranges), asks ``ops/implementation.py`` which
implementation runs, imports it and calls it.  A new implementation is one ``_register`` line
below; schemas and callers stay as they are.
"""

import torch

# Imported for what they define.
from fpt_fast.ops import (  # noqa: F401
    frozen_schemas,
    linear_schemas,
    side_schemas,
    trained_schemas,
)
from fpt_fast.ops.cuda_reasons import (
    cudnn_reasons,
    efficient_reasons,
    flash_reasons,
    xformers_reasons,
)
from fpt_fast.ops.direct import call as call
from fpt_fast.ops.implementation import (
    Implementation,
    Reasons,
    anywhere,
    needs_device,
    register,
)
from fpt_fast.ops.native_reasons import (
    native_bf16_reasons,
    native_floats_reasons,
    native_layers_reasons,
    native_narrow_reasons,
    native_prompt_reasons,
    native_reasons,
    native_tiles_reasons,
)
from fpt_fast.ops.triton_reasons import triton_reasons

ops = torch.ops.fpt


def _register(op: str, name: str, module: str, reasons: Reasons = anywhere) -> None:
    register(Implementation(op, name, module, op, reasons))


# Of one op, the implementation that auto prefers stands first.
_cpu = needs_device("cpu")
_register("frozen_attention", "native", "fpt_fast.ops.native", native_floats_reasons)
_register("frozen_attention", "cpu", "fpt_fast.ops.cpu", _cpu)
# No GPU has measured this order: flash takes f16 and bf16, efficient the f32 that flash does not.
for _name, _reasons in (
    ("flash", flash_reasons),
    ("efficient", efficient_reasons),
    ("cudnn", cudnn_reasons),
    ("xformers", xformers_reasons),
):
    register(
        Implementation("frozen_attention", _name, "fpt_fast.ops.cuda_attention", _name, _reasons)
    )
_register("frozen_attention", "blocked", "fpt_fast.ops.cpu")
_register("frozen_attention", "reference", "fpt_fast.ops.reference_ops")
_register("token_scores", "native", "fpt_fast.ops.native", native_floats_reasons)
_register("token_scores", "cpu", "fpt_fast.ops.cpu", _cpu)
_register("token_scores", "blocked", "fpt_fast.ops.cpu")
_register("token_scores", "reference", "fpt_fast.ops.reference_ops")
_register("select_tokens", "native", "fpt_fast.ops.native", native_reasons)
_register("select_tokens", "cpu", "fpt_fast.ops.cpu", _cpu)
_register("select_tokens", "reference", "fpt_fast.ops.reference_ops")
_register("quantise_kv", "cpu", "fpt_fast.ops.cpu", _cpu)
_register("quantise_kv", "reference", "fpt_fast.ops.reference_ops")
for _op in (
    "prompt_attention",
    "prompt_attention_backward",
    "prompt_attention_indexed",
    "prompt_attention_indexed_backward",
):
    _register(_op, "native", "fpt_fast.ops.native", native_prompt_reasons)
    _register(_op, "cpu", "fpt_fast.ops.cpu", _cpu)
    _register(_op, "reference", "fpt_fast.ops.reference_ops")
# The public function hands "torch" to torch's own attention and gradient; here it is the oracle.
for _op in ("side_attention", "side_attention_backward"):
    _register(_op, "native", "fpt_fast.ops.native", native_narrow_reasons)
    _register(_op, "torch", "fpt_fast.ops.reference_ops")
    _register(_op, "reference", "fpt_fast.ops.reference_ops")
_register("frozen_linear", "native", "fpt_fast.ops.native", native_tiles_reasons)
_register("frozen_linear", "torch", "fpt_fast.ops.torch_linear")
_register("frozen_linear", "reference", "fpt_fast.ops.reference_ops")
for _op in ("side_layers", "side_layers_backward"):
    _register(_op, "native", "fpt_fast.ops.native", native_layers_reasons)
    _register(_op, "torch", "fpt_fast.ops.reference_ops")
    _register(_op, "reference", "fpt_fast.ops.reference_ops")
_register("trained_linear", "native", "fpt_fast.ops.native", native_bf16_reasons)
_register(
    "trained_linear_backward",
    "native",
    "fpt_fast.ops.native",
    lambda args: native_bf16_reasons((*args[1:3], None, args[3])),
)
for _op in ("trained_linear", "trained_linear_backward"):
    _register(_op, "torch", "fpt_fast.ops.reference_ops")
    _register(_op, "reference", "fpt_fast.ops.reference_ops")
# Last, so that auto does not choose them: no GPU has run these kernels yet (issues 3 and 8).  Once
# `make device` has, they belong behind "cpu".
_register("frozen_attention", "triton", "fptkernels.frozen_attention", triton_reasons(width_of=0))
_register("token_scores", "triton", "fptkernels.token_scores", triton_reasons(width_of=0))
_register("select_tokens", "triton", "fptkernels.select_tokens", triton_reasons(width_of=1))
_register("quantise_kv", "triton", "fptkernels.quantise_kv", triton_reasons(width_of=0))
for _op in ("prompt_attention", "prompt_attention_indexed"):
    _register(_op, "triton", "fptkernels.prompt_attention", triton_reasons(width_of=0))
    _backward = f"{_op}_backward"
    _register(_backward, "triton", "fptkernels.prompt_attention", triton_reasons(width_of=1))
