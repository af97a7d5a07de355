"""From an image to the keys and values that are kept of it: frozen pass, importance, selection."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fpt_fast.backbone import FrozenBackbone
from fpt_fast.ops import select_tokens, token_scores
from fpt_fast.profiling import span
from fpt_fast.records import Importance, SelectedTokens


def keep_count(token_ratio: float, num_tokens: int) -> int:
    """Return ``K = int(token_ratio · N)``, the number of tokens kept per head.

    Raises ``ValueError`` where that is none: an empty set of keys has no softmax.
    """
    keep = int(token_ratio * num_tokens)
    if not 1 <= keep <= num_tokens:
        raise ValueError(
            f"token_ratio {token_ratio} keeps {keep} of {num_tokens} tokens, and must keep at "
            f"least one, at most all: use a ratio of {1 / num_tokens:.4g} to 1, or a larger input"
        )
    return keep


@torch.no_grad()
def select_features(
    backbone: FrozenBackbone,
    pixels: Tensor,
    *,
    layers: Sequence[int],
    token_ratio: float,
    importance: Importance,
    dtype: torch.dtype = torch.float16,
    impl: str = "auto",
) -> SelectedTokens:
    """Run the frozen pass on ``pixels`` [B, 3, h, w] and keep the important tokens of ``layers``.

    Returns ``kv`` [B, L, 2, H, K, D] of ``dtype`` and ``index`` [B, L, H, K] i32 on the
    backbone's device, ready for a cache.  Keys and values are rounded to ``dtype`` and never
    clamped: one beyond its range becomes infinite, which the cache's writer refuses, naming the
    image.  ``impl`` is that of ``token_scores`` and ``select_tokens``; the attention's is
    ``backbone.attention``.  Raises ``ValueError`` for sizes, layers and ratios that cannot be.
    """
    spec = backbone.spec
    if importance == "class_token" and not spec.has_class_token:
        raise ValueError(
            f"importance='class_token' needs a class token, which {spec.name} has not; "
            "use importance='global'"
        )
    states = backbone.extract(pixels, layers, importance=importance)
    batch, head_width = pixels.shape[0], spec.head_width
    keep = keep_count(token_ratio, spec.num_tokens((pixels.shape[2], pixels.shape[3])))
    shape = (batch, len(layers), 2, spec.num_heads, keep, head_width)
    kv = torch.empty(shape, dtype=dtype, device=backbone.device)
    index = torch.empty((*shape[:2], *shape[3:5]), dtype=torch.int32, device=backbone.device)
    with span("frozen pass"):  # layer by layer, as the loop asks for them
        for position, layer in enumerate(states):
            with span("select"):
                scores = layer.scores
                if scores is None:
                    scores = token_scores(
                        layer.q, layer.k, importance=importance, lse=layer.lse, impl=impl
                    )
                kept, where = select_tokens(scores, layer.k, layer.v, keep, dtype=dtype, impl=impl)
                kv[:, position] = kept
                index[:, position] = where
    return SelectedTokens(kv, index)
