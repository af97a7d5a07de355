"""An image with kept tokens and prompt weights, small enough to count by hand."""

from typing import Any

import torch

from fpt_fast.records import TokenExample


def make_example(**changes: Any) -> TokenExample:
    """16x24 pixels, 2x3 patches and one class token; two layers of two heads keep two tokens."""
    values: dict[str, Any] = {
        "key": "test/<img src=x onerror=alert(1)>.png",
        "pixels": torch.full((3, 16, 24), 100, dtype=torch.uint8),
        "index": torch.tensor([[[0, 1], [1, 6]], [[1, 2], [1, 6]]], dtype=torch.int32),
        "layers": (2, 3),
        "grid": (2, 3),
        "prefix_tokens": 1,
        "label": 2,
        "probabilities": torch.tensor([0.1, 0.2, 0.6, 0.1]),
    }
    return TokenExample(**{**values, **changes})


def looking_example(**changes: Any) -> TokenExample:
    """Two prompts; in the second layer both heads look at patch 5 (token 6) alone."""
    weights = torch.tensor(
        [
            [[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.75, 0.25]]],
            [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
        ]
    )
    return make_example(weights=weights, **changes)
