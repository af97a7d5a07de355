"""Where a model's prompts look: their attention over the kept tokens of each image."""

import torch
from torch import Tensor

from fpt_fast.fusion import PromptFusion


@torch.no_grad()
def prompt_weights(
    fusion: PromptFusion, kv: Tensor, scales: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of every prompt over the kept tokens: kv [B, L, 2, H, K, D] -> [B, L, H, P, K] f32.

    The softmax of which ``prompt_attention`` gives the product with the values; each row sums to
    1.  ``scales`` belong to 8-bit ``kv``.  Raises ``ValueError`` where ``kv`` was not made for
    this model.
    """
    fusion.check(kv)
    keys = kv[:, :, 0].float()  # [B, L, H, K, D]
    if scales is not None:
        keys = keys * scales[0].unsqueeze(-2)
    queries = fusion.queries().float().to(keys.device)  # [L, H, P, D]
    logits = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1)
