"""Column means by two passes of FlexAttention: what the ecosystem offers for token_scores.

Queries and keys trade places in the second pass: with the row log-sum-exp taken off every logit,
the log-sum-exp over the queries of a key is ``log(N * score)``.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention


def column_means(q: Tensor, k: Tensor, lse: Tensor | None) -> Mapping[str, Callable[[], Tensor]]:
    """The double pass, or, with ``lse`` given, the second pass alone."""

    def run() -> Tensor:
        attend = _attention(q.device.type == "cuda")
        rows = attend(q, k, k, None) if lse is None else lse

        def off_lse(logit: Tensor, b: Tensor, h: Tensor, key: Tensor, query: Tensor) -> Tensor:
            return logit - rows[b, h, query]

        return attend(k, q, q, off_lse).exp() / q.shape[2]

    return {"flex_attention": run}


@cache
def _attention(is_compiled: bool) -> Callable[..., Tensor]:
    """Row log-sum-exp by FlexAttention, compiled where it has kernels."""
    function: Any = torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention

    def lse_of(q: Tensor, k: Tensor, v: Tensor, score_mod: object) -> Tensor:
        _, aux = function(q, k, v, score_mod=score_mod, return_aux=AuxRequest(lse=True))
        lse: Tensor = aux.lse
        return lse

    return lse_of
