"""From tokens back to the image: which patches are kept, and how much the prompts look at each."""

import torch
from torch import Tensor

from fpt_fast.records import TokenExample


def kept_by_head(example: TokenExample) -> Tensor:
    """Whether each layer and head keeps each patch: [L, H, rows, columns] bool."""
    _check_index(example)
    kept = torch.zeros(*example.index.shape[:2], _tokens(example), dtype=torch.bool)
    return _on_grid(kept.scatter(2, example.index.long(), True), example)


def kept_share(example: TokenExample) -> Tensor:
    """Share of layers and heads that keep each patch: [rows, columns] f32 in [0, 1].

    Raises ``ValueError`` where the index does not fit the grid.
    """
    return kept_by_head(example).float().mean(dim=(0, 1))


def attention_by_head(example: TokenExample) -> Tensor:
    """Attention of the prompts on each patch, their mean: [L, H, rows, columns] f32.

    Over a layer and head it sums to 1, less what falls on prefix tokens (the class token), and is
    0 where nothing was kept.  Raises ``ValueError`` where the example has no weights.
    """
    _check_index(example)
    layers, heads, kept = example.index.shape
    weights = example.weights
    if weights is None:
        raise ValueError(f"{example.key!r} has no prompt weights: ask for them with a model")
    if (*weights.shape[:2], weights.shape[-1]) != (layers, heads, kept):
        raise ValueError(
            f"weights of {example.key!r} must be [{layers}, {heads}, prompts, {kept}], got "
            f"{tuple(weights.shape)}"
        )
    spread = torch.zeros(layers, heads, _tokens(example))
    spread = spread.scatter_add(2, example.index.long(), weights.float().mean(dim=2))
    return _on_grid(spread, example)


def attention_share(example: TokenExample) -> Tensor:
    """Attention on each patch, the mean of layers, heads and prompts: [rows, columns] f32."""
    return attention_by_head(example).mean(dim=(0, 1))


def _tokens(example: TokenExample) -> int:
    rows, columns = example.grid
    return example.prefix_tokens + rows * columns


def _on_grid(tokens: Tensor, example: TokenExample) -> Tensor:
    """[L, H, tokens] without its prefix -> [L, H, rows, columns]."""
    patches = tokens[..., example.prefix_tokens :]
    return patches.reshape(*patches.shape[:-1], *example.grid)


def _check_index(example: TokenExample) -> None:
    rows, columns = example.grid
    tokens = _tokens(example)
    index = example.index
    if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= tokens:
        raise ValueError(
            f"index of {example.key!r} must hold tokens in 0..{tokens - 1} "
            f"({example.prefix_tokens} prefix tokens and {rows}x{columns} patches), "
            f"got {tuple(index.shape)} values"
            + (f" in {int(index.min())}..{int(index.max())}" if index.numel() else "")
        )
