"""From a module with timm's block interface to a ``FrozenVit``, or a reason why not.

The interface: ``patch_embed`` (``proj``, a Conv2d; ``grid_size``), ``cls_token``, ``pos_embed``,
``blocks`` (each with ``norm1``, ``attn``, ``norm2``, ``mlp`` and optionally ``ls1``, ``ls2``),
``norm``.  What is checked here is structure, to give a good reason; ``self_check.py`` then
proves that the numbers agree.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fpt_fast.backbone.errors import BackboneError
from fpt_fast.backbone.vit import Embedding, FrozenBlock, FrozenVit

_BLOCK_PARTS = {"norm1", "attn", "ls1", "norm2", "mlp", "ls2"}
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "norm", "proj"}


def adapt_module(module: nn.Module) -> FrozenVit:
    """Bring ``module`` into the form that the frozen pass runs; its submodules are shared.

    Raises ``BackboneError`` naming the first thing that the frozen pass cannot do.
    """
    blocks, patch_embed, norm = (_part(module, name) for name in ("blocks", "patch_embed", "norm"))
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        raise BackboneError(f"its `blocks` are {_describe(blocks)}, not a sequence of blocks")
    for name in ("rope", "rel_pos_bias", "shared_rel_pos"):
        if getattr(module, name, None) is not None:
            raise BackboneError(f"it has `{name}`: relative or rotary positions are not supported")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise BackboneError("its parameters are on the meta device, without values")
    frozen = [_adapt_block(block, index) for index, block in enumerate(blocks)]
    embedding = _adapt_embedding(module, patch_embed)
    pooled = getattr(module, "fc_norm", None)
    return FrozenVit(embedding, frozen, norm, pooled if isinstance(pooled, nn.Module) else None)


def has_class_token(module: nn.Module) -> bool:
    """True where the first token is a class token."""
    return getattr(module, "cls_token", None) is not None


def _adapt_embedding(module: nn.Module, patch_embed: nn.Module) -> Embedding:
    proj = getattr(patch_embed, "proj", None)
    _refuse_extra(patch_embed, "patch_embed", {"proj", "norm"})
    if not isinstance(proj, nn.Conv2d):
        raise BackboneError(
            f"its `patch_embed.proj` is {_describe(proj)}, not a Conv2d over pixels (hybrid models "
            "with a convolutional stem are not supported)"
        )
    if proj.kernel_size != proj.stride or any(proj.padding) or proj.groups != 1:
        raise BackboneError(
            f"its patches overlap: kernel {proj.kernel_size}, stride {proj.stride}, padding "
            f"{proj.padding}"
        )
    if proj.in_channels != 3:
        raise BackboneError(f"it takes {proj.in_channels} channels, not 3")
    prefix = [_token(module, name) for name in ("cls_token", "dist_token")]
    prefix += [_token(module, name) for name in ("reg_token", "register_tokens")]
    tokens = [token for token in prefix if token is not None]
    width = proj.out_channels
    joined = torch.cat(tokens, 1) if tokens else torch.zeros((1, 0, width)).to(proj.weight)
    position = getattr(module, "pos_embed", None)
    grid = _grid(patch_embed, proj)
    if position is not None:
        position = position.detach()
        _check_position(position, grid, joined.shape[1], tokens, width)
    return Embedding(
        proj,
        _optional(patch_embed, "norm"),
        joined,
        position,
        grid,
        _optional(module, "norm_pre"),
    )


def _check_position(
    position: Tensor, grid: tuple[int, int], prefix: int, tokens: list[Tensor], width: int
) -> None:
    patches = grid[0] * grid[1]
    # DINOv2's own layout has one position for the class token and none for the registers.
    allowed = {patches, patches + prefix, patches + min(1, len(tokens))}
    if position.dim() != 3 or position.shape[2] != width or position.shape[1] not in allowed:
        raise BackboneError(
            f"its `pos_embed` is {tuple(position.shape)}; for a grid of {grid} patches and "
            f"{prefix} prefix tokens it should be [1, {patches} or {patches + prefix}, {width}]"
        )


def _adapt_block(block: nn.Module, index: int) -> FrozenBlock:
    where = f"blocks[{index}]"
    for name in ("norm1", "attn", "norm2", "mlp"):
        if not isinstance(getattr(block, name, None), nn.Module):
            raise BackboneError(
                f"its {where} is a {type(block).__name__} without `{name}`: only blocks that run "
                "attention and then an MLP, each behind its norm, can run (no parallel blocks)"
            )
    _refuse_extra(block, where, _BLOCK_PARTS)
    attention: Any = block.attn
    _check_attention(attention, f"{where}.attn")
    return FrozenBlock(
        attention.num_heads,
        block.norm1,  # type: ignore[arg-type]
        attention.qkv,
        attention.proj,
        block.norm2,  # type: ignore[arg-type]
        block.mlp,  # type: ignore[arg-type]
        q_norm=_optional(attention, "q_norm"),
        k_norm=_optional(attention, "k_norm"),
        attention_norm=_optional(attention, "norm"),
        scale1=_optional(block, "ls1"),
        scale2=_optional(block, "ls2"),
    )


def _check_attention(attention: Any, where: str) -> None:
    for name in ("qkv", "proj"):
        if not isinstance(getattr(attention, name, None), nn.Linear):
            raise BackboneError(
                f"its {where} is a {type(attention).__name__} whose `{name}` is "
                f"{_describe(getattr(attention, name, None))}, not a Linear"
            )
    _refuse_extra(attention, where, _ATTENTION_PARTS)
    heads, width = getattr(attention, "num_heads", None), attention.qkv.in_features
    if not isinstance(heads, int) or width % heads or attention.qkv.out_features != 3 * width:
        raise BackboneError(
            f"its {where} has {heads} heads and a `qkv` of {width} to "
            f"{attention.qkv.out_features}; it should be {width} to {3 * width}, with heads that "
            f"divide {width}"
        )
    head_width = getattr(attention, "head_dim", width // heads)
    if head_width != width // heads:
        raise BackboneError(f"its {where} has heads {head_width} wide, not {width // heads}")
    scale = getattr(attention, "scale", None)
    if isinstance(scale, float) and abs(scale * head_width**0.5 - 1) > 1e-3:
        raise BackboneError(
            f"its {where} scales scores by {scale}, not by {head_width**-0.5} (1/sqrt of the "
            "head width)"
        )


def _refuse_extra(module: nn.Module, where: str, known: set[str]) -> None:
    """What holds weights and is not known to the frozen pass would be left out silently."""
    extra = [name for name, _ in module.named_parameters(recurse=False)]
    extra += [
        name
        for name, child in module.named_children()
        if name not in known and any(True for _ in child.parameters())
    ]
    if extra:
        raise BackboneError(
            f"its {where} is a {type(module).__name__} with {', '.join(f'`{n}`' for n in extra)}, "
            "which the frozen pass does not know"
        )


def _part(module: nn.Module, name: str) -> nn.Module:
    part = getattr(module, name, None)
    if not isinstance(part, nn.Module):
        raise BackboneError(
            f"it has no `{name}`: it is a {type(module).__name__}, not a plain vision transformer "
            "with one sequence of tokens (Swin and convolutional models are none)"
        )
    return part


def _optional(module: Any, name: str) -> nn.Module:
    part = getattr(module, name, None)
    return part if isinstance(part, nn.Module) else nn.Identity()


def _token(module: nn.Module, name: str) -> Tensor | None:
    token = getattr(module, name, None)
    if token is None:
        return None
    if not isinstance(token, Tensor) or token.dim() != 3 or token.shape[0] != 1:
        raise BackboneError(f"its `{name}` is {_describe(token)}, not a parameter [1, tokens, C]")
    return token.detach()


def _grid(patch_embed: nn.Module, proj: nn.Conv2d) -> tuple[int, int]:
    grid = getattr(patch_embed, "grid_size", None)
    size = getattr(patch_embed, "img_size", None)
    if isinstance(size, int):
        size = (size, size)
    if grid is None and size is not None:
        grid = (size[0] // proj.kernel_size[0], size[1] // proj.kernel_size[1])
    if grid is None:
        raise BackboneError(
            "its `patch_embed` has neither `grid_size` nor `img_size`; set one to (rows, columns) "
            "of patches, or to the image size, that it was trained at"
        )
    return int(grid[0]), int(grid[1])


def _describe(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"
