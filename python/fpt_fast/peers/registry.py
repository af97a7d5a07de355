"""The peers by name: each a function that turns a frozen encoder into what the method trains."""

from collections.abc import Callable

from torch import nn

from fpt_fast.config import PeerMethod
from fpt_fast.peers import adapter, attention, bitfit, full, linear, lora, prompt, side
from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder

# From an encoder without gradients to a module of pixels [B, 3, h, w] to vectors [B, C], in which
# exactly the method's own parameters have them.
Apply = Callable[[Encoder, PeerConfig], nn.Module]

PEERS: dict[PeerMethod, Apply] = {
    "full": full.apply,
    "linear": linear.apply,
    "prompt": prompt.apply,
    "attention": attention.apply,
    "adapter": adapter.apply,
    "bitfit": bitfit.apply,
    "lora": lora.apply,
    "side": side.apply,
}
