"""A name for the weights of a frozen model, by content."""

from typing import Any

import torch
import xxhash
from torch import nn

from fpt_fast.backbone.vit import FrozenVit


def weights_hash(vit: FrozenVit) -> str:
    """Return the xxh3-128, in hex, of all that shapes the features beside the image.

    That is names, dtypes, shapes and bytes of the parameters that the frozen pass reads, in
    the dtype they came in, and the settings that are not parameters: heads, the epsilons of
    the norms, the activations.  Classification heads and pooling do not count, and names are
    those of ``FrozenVit``, so that one set of weights has one hash whichever format it came in.
    """
    digest = xxhash.xxh3_128()
    for name, module in sorted(vit.named_modules()):
        settings = _settings(module)
        if settings:
            digest.update(f"{name} {settings}\n".encode())
    for name, parameter in sorted(vit.named_parameters()):
        data = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        values: Any = data.flatten().view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def _settings(module: nn.Module) -> str:
    if hasattr(module, "eps"):
        return f"eps={module.eps!r}"
    if hasattr(module, "num_heads"):
        return f"num_heads={module.num_heads}"
    is_leaf = not any(True for _ in module.children()) and not any(
        True for _ in module.parameters()
    )
    if is_leaf and not isinstance(module, nn.Identity | nn.Dropout):
        return f"{type(module).__name__} {getattr(module, 'approximate', '')}"
    return ""
