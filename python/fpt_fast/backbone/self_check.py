"""Proof, at load time, that the frozen pass computes what the model's own forward computes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_fast.backbone.errors import BackboneError
from fpt_fast.backbone.timm_modules import adapt_module
from fpt_fast.backbone.vit import FrozenVit

_TOLERANCE = 1e-4
# Patches that the blocks get to see: enough to tell any two functions apart, cheap for a
# model of any size or resolution.
_PATCHES = 24


@dataclass
class _Trace:
    """What the model's own forward computed: inputs and outputs of the parts we replace."""

    embedded: Tensor | None = None
    norm: Tensor | None = None
    block_in: dict[int, Tensor] = field(default_factory=dict)
    block_out: dict[int, Tensor] = field(default_factory=dict)
    attention_out: dict[int, Tensor] = field(default_factory=dict)
    mlp_in: dict[int, Tensor] = field(default_factory=dict)


def check_own_pass(module: nn.Module, image_size: tuple[int, int]) -> None:
    """Compare the frozen pass with ``module``'s own forward on one random image of its native size.

    In f32, part by part: embedding, each attention, what each MLP is given, each block, final
    norm.  Parts are compared before layer-scale, which may hide a wrong branch behind a factor
    of 1e-5.  After the embedding only a few tokens go on, so that the check is cheap even for
    the largest models.  Raises ``BackboneError`` naming the first part that differs by more than
    1e-4 of its norm.
    """
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = copy.deepcopy(module).float()
    training = module.training
    module.eval()
    try:
        vit = adapt_module(module).eval()
        parameter = next(module.parameters())
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn((1, 3, *image_size), generator=generator).to(parameter.device)
        prefix = vit.embedding.prefix.shape[1]
        with torch.no_grad():
            trace = _run_own(module, pixels, prefix + _PATCHES)
            _compare(vit, pixels, trace)
    finally:
        module.train(training)


def _run_own(module: nn.Module, pixels: Tensor, tokens: int) -> _Trace:
    trace = _Trace()
    handles = _hook(module, trace, tokens)
    run: Callable[[Tensor], Any] = getattr(module, "forward_features", module)
    try:
        run(pixels)
    except Exception as error:
        size = f"{pixels.shape[2]}x{pixels.shape[3]}"
        raise BackboneError(
            f"its own forward fails on one {size} image cut to {tokens} tokens: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _hook(module: Any, trace: _Trace, tokens: int) -> list[Any]:
    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        trace.embedded = args[0].clone()
        return (args[0][:, :tokens].clone(), *args[1:])

    def keep_in(store: dict[int, Tensor], index: int) -> Callable[..., None]:
        # Cloned, for a module may go on working in place.
        return lambda _, args: store.update({index: args[0].clone()})

    def keep_out(store: dict[int, Tensor], index: int) -> Callable[..., None]:
        return lambda _, args, out: store.update({index: _first(out).clone()})

    def keep_norm(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        trace.norm = out.clone()

    handles = [module.blocks[0].register_forward_pre_hook(cut)]
    for index, block in enumerate(module.blocks):
        handles += [
            block.register_forward_pre_hook(keep_in(trace.block_in, index)),
            block.register_forward_hook(keep_out(trace.block_out, index)),
            block.attn.register_forward_hook(keep_out(trace.attention_out, index)),
            block.mlp.register_forward_pre_hook(keep_in(trace.mlp_in, index)),
        ]
    handles.append(module.norm.register_forward_hook(keep_norm))
    return handles


def _compare(vit: FrozenVit, pixels: Tensor, trace: _Trace) -> None:
    _agree("embedding", vit.embedding(pixels, "timm"), trace.embedded)
    for index in range(len(vit.blocks)):
        name = f"blocks[{index}]"
        if index not in trace.block_in:
            raise BackboneError(f"its own forward never runs {name}")
        block, x = vit.block(index), trace.block_in[index]
        attended = F.scaled_dot_product_attention(*block.project(x))
        attention = block.merge(attended)
        _agree(f"{name}.attn (behind norm1)", attention, trace.attention_out.get(index))
        mlp_in = block.norm2(x + block.scale1(attention))
        _agree(f"{name}.mlp's input (behind norm2)", mlp_in, trace.mlp_in.get(index))
        _agree(name, block.complete(x, attended), trace.block_out.get(index))
        # The pass runs MLPs on chunks of tokens, so that an MLP must not mix tokens.
        parts = torch.cat([block.mlp(part) for part in mlp_in.split(5, dim=1)], 1)
        _agree(f"{name}.mlp, on a few tokens at a time,", parts, block.mlp(mlp_in))
        if index and not torch.equal(x, trace.block_out[index - 1]):
            raise BackboneError(f"its own forward changes tokens between blocks before {name}")
    _agree("norm", vit.norm(trace.block_out[len(vit.blocks) - 1]), trace.norm)


def _agree(name: str, ours: Tensor, own: Tensor | None) -> None:
    if own is None:
        raise BackboneError(f"its own forward never runs {name}")
    if ours.shape != own.shape:
        raise BackboneError(f"its own {name} gives {tuple(own.shape)}, not {tuple(ours.shape)}")
    if not bool(own.isfinite().all()):
        raise BackboneError(f"its own {name} gives values that are not finite; are its weights?")
    norm = float(own.norm())
    error = float((ours - own).norm()) / norm if norm > 0 else float((ours - own).norm())
    if not error <= _TOLERANCE:
        raise BackboneError(
            f"the frozen pass does not reproduce its {name}: relative difference {error:.1e} in "
            "f32; it computes something else than a plain pre-norm vision transformer (post-norm "
            "blocks, for one, do)"
        )


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]
