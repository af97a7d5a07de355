"""LoRA (Hu et al., ICLR 2022) through peft: low-rank updates of the attention's projections."""

from torch import nn

from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train an update of ``rank`` to the fused projection to query, key and value of each layer.

    It has as many parameters as updates of that rank to the query's and the value's projections.
    With ``lora_targets`` ``"attention"`` the projection of the output has an update as well.
    They are scaled by 1 (alpha = rank), without dropout.  Raises ``ImportError`` without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            f"method='lora' goes through peft, which cannot be imported ({error}); install it with "
            "pip install 'fpt-fast[peers]'"
        ) from error
    targets = ["qkv"] if config.lora_targets == "qkv" else ["qkv", "proj"]
    lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets)
    inject_adapter_in_model(lora, encoder.vit)
    return encoder
