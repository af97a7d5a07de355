"""The whole classifier, frozen model included, in torch's own operations: what can be exported.

No custom op, no cache, no block: attention maps are whole, so a pass takes memory O(N²).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_fast.backbone import FrozenBackbone
from fpt_fast.config import ConfigError
from fpt_fast.fusion import PromptFusion
from fpt_fast.model import FptModel
from fpt_fast.records import Importance
from fpt_fast.selection import keep_count
from fpt_fast.side_network import SideLayer


class PortableClassifier(nn.Module):
    """``forward(frozen_pixels [B, 3, H, W], side_pixels [B, 3, h, w]) -> [B, outputs]`` f32.

    Both inputs are normalised as ``to_network_input`` does; ``input_size`` (H, W) is fixed.
    ``output`` is ``"softmax"``, ``"sigmoid"`` (several findings) or ``"none"`` (grades, or numbers
    with the mean and deviation of ``target``).  Logits are divided by ``temperature``, one number
    or one for each output.  Kept keys and values are rounded to f16, as the features are that the
    model was trained on; of tokens with exactly equal scores either may be kept.  Raises
    ``ConfigError`` for a side network alone, which needs no frozen model.
    """

    temperature: Tensor

    def __init__(
        self,
        model: FptModel,
        backbone: FrozenBackbone,
        *,
        layers: tuple[int, ...],
        token_ratio: float,
        importance: Importance,
        input_size: tuple[int, int],
        output: str = "softmax",
        temperature: float | Tensor = 1.0,
        target: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if model.fusion is None:
            raise ConfigError("a side network alone has no frozen model to export with it")
        self.vit = backbone.vit
        self.fusion: PromptFusion = model.fusion
        self.side = model.side
        self.layers = layers
        self.keep = keep_count(token_ratio, backbone.spec.num_tokens(input_size))
        self.importance = importance
        self.interpolation = backbone.position_interpolation
        self.output = output
        self.register_buffer("temperature", torch.as_tensor(temperature, dtype=torch.float32))
        self.mean, self.deviation = target or (0.0, 1.0)
        # The embedding keeps what it made of the positions for this size: constants of a graph.
        weight = self.vit.embedding.projection.weight
        self.vit.embedding(
            torch.zeros(1, 3, *input_size, dtype=weight.dtype, device=weight.device),
            self.interpolation,
        )

    def forward(self, frozen_pixels: Tensor, side_pixels: Tensor) -> Tensor:
        """Probabilities [B, classes], or grades or numbers [B, 1]."""
        states = self._states(self._features(frozen_pixels))
        logits = self._logits(side_pixels, states) / self.temperature
        if self.output == "softmax":
            return logits.softmax(dim=1)
        if self.output == "sigmoid":
            return logits.sigmoid()
        return logits * self.deviation + self.mean

    def _features(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Kept keys and values of each layer: [B, H, K, D] twice."""
        x = self.vit.embedding(pixels, self.interpolation)
        kept = []
        for index in range(self.layers[-1] + 1):
            block = self.vit.block(index)
            q, k, v = block.project(x)
            weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
            if index in self.layers:
                chosen = weights[:, :, 0] if self.importance == "class_token" else weights.mean(2)
                where = chosen.topk(self.keep, dim=-1).indices.unsqueeze(-1)  # [B, H, K, 1]
                where = where.expand(-1, -1, -1, k.shape[-1])
                kept.append((_rounded(k.gather(2, where)), _rounded(v.gather(2, where))))
            if index < self.layers[-1]:
                x = x + block.scale1(block.merge(weights @ v))
                x = x + block.scale2(block.mlp(block.norm2(x)))
        return kept

    def _states(self, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[L, B, P, S]."""
        queries = self.fusion.queries()  # [L, H, P, D]
        attended = []
        for number, (keys, values) in enumerate(kept):
            logits = queries[number] @ keys.transpose(-2, -1) / math.sqrt(keys.shape[-1])
            out = torch.softmax(logits, dim=-1) @ values  # [B, H, P, D]
            attended.append(out.transpose(1, 2).flatten(2))
        return self.fusion.project(torch.stack(attended))

    def _logits(self, pixels: Tensor, states: Tensor) -> Tensor:
        tokens = self.side.embed(pixels)
        for number, layer in enumerate(self.side.layers):
            assert isinstance(layer, SideLayer)
            seen = layer.norm1(torch.cat((tokens, states[number]), dim=1))
            heads = layer.qkv(seen).unflatten(2, (3, layer.num_heads, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
            q = q[:, :, : tokens.shape[1]]
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + layer.proj(attended)
            tokens = tokens + layer.fc2(F.gelu(layer.fc1(layer.norm2(tokens))))
        logits: Tensor = self.side.head(self.side.norm(tokens[:, 0]))
        return logits


def _rounded(values: Tensor) -> Tensor:
    """To f16 and back."""
    return values.half().to(values.dtype)
