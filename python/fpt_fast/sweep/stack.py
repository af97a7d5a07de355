"""Several models of one configuration side by side: their weights in one buffer, their products
batched.

Prompts of all models are rows of one ``q``, so that one pass over the features serves all of
them.  ``W`` is the number of models here; the other letters are those of ``records.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.fusion import query_dtype
from fpt_fast.model import FptModel
from fpt_fast.ops import SideWeights, side_attention
from fpt_fast.ops.modules import multiplies_in_bf16
from fpt_fast.side_network import run_layers


class ModelStack:
    """The weights of ``W`` models, [W, n] in one buffer, and their forward pass.

    The models must have equal configurations and all parameters trainable; they are read here
    and not kept.  Row ``w`` of every result is what model ``w`` alone computes, up to rounding,
    and depends on no other row.
    """

    def __init__(self, models: Sequence[FptModel]) -> None:
        if not models:
            raise ValueError("a stack needs at least one model, got none")
        first = models[0]
        self.config, self.spec, self.num_outputs = first.config, first.spec, first.num_outputs
        for model in models:
            _check_equal(first, model)
        self._shapes = {name: weight.shape for name, weight in first.named_parameters()}
        self._side_grid, self._patch_size = first.side.grid, first.side.patch_size
        self._num_layers = len(first.layers)
        self.weights = torch.stack([_flatten(model) for model in models])  # [W, n]
        self.gradients = torch.zeros_like(self.weights)
        self._bind()

    def __len__(self) -> int:
        """Models that are still in the stack."""
        return len(self.weights)

    def to(self, device: torch.device) -> None:
        """Move weights and gradients to ``device``."""
        self.weights, self.gradients = self.weights.to(device), self.gradients.to(device)
        self._bind()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all models but ``rows``."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.weights.device)
        self.weights, self.gradients = self.weights[index], self.gradients[index]
        self._bind()

    def load(self, weights: Tensor) -> None:
        """Take the weights [W, n] of other models of this configuration."""
        with torch.no_grad():
            self.weights.copy_(weights)

    def state_dict(self, weights: Tensor) -> dict[str, Tensor]:
        """One row of weights [n] as the state dict of an ``FptModel``."""
        return {name: part[0] for name, part in self._parts(weights.unsqueeze(0)).items()}

    def queries(self) -> Tensor:
        """Prompts of all models as rows of one ``q`` [L, H, W * P, D], model by model."""
        prompts = self._of["fusion.prompts"].squeeze(2)  # [W, L, P, prompt_dim]
        if self.config.prompt_norm:
            prompts = self._norm("fusion.layer_norm", prompts, 1e-5)
        if self.config.prompt_proj:
            prompts = self._linear("fusion.prompt_proj", prompts)
        models, layers, count, channels = prompts.shape
        heads = self.spec.num_heads
        prompts = prompts.to(query_dtype(self.weights))
        split = prompts.view(models, layers, count, heads, channels // heads)
        return split.permute(1, 3, 0, 2, 4).flatten(2, 3)

    def forward(self, pixels: Tensor, attended: Tensor | None, keep: Tensor | None) -> Tensor:
        """Logits [W, B, num_outputs] f32 of normalised ``pixels`` [W, B, 3, h, w].

        ``attended`` [L, B, W * P, C] is ``prompt_attention`` of ``queries``, or None for side
        networks alone.  ``keep`` [W, L, B, P, S] holds the factors of the fusion's dropout (0, or
        1 over the share that is kept), or None outside training.
        """
        states = None if attended is None else self._states(attended, keep)
        tokens = self._embed(pixels)
        if multiplies_in_bf16(tokens.device.type):
            tokens = self._layers_model_by_model(tokens, states)
        else:
            for layer in range(self._num_layers):
                # The head reads the class token alone: nothing else of the last layer is needed.
                queries = 1 if layer + 1 == self._num_layers else tokens.shape[2]
                prompts = None if states is None else states[:, layer]
                tokens = self._layer(f"side.layers.{layer}", tokens, prompts, queries)
        last = self._norm("side.norm", tokens[:, :, 0], self.config.layer_norm_eps)
        return self._linear("side.head", last)

    @property
    def leaves(self) -> list[Tensor]:
        """The weights as leaves of autograd."""
        return list(self._of.values())

    def take_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Set ``gradients`` to those given, in the order of ``leaves``."""
        for part, gradient in zip(self._gradient_of.values(), gradients, strict=True):
            part.copy_(gradient)

    def _states(self, attended: Tensor, keep: Tensor | None) -> Tensor:
        """States [W, L, B, P, S] of what the prompts read."""
        layers, batch, _, channels = attended.shape
        split = attended.view(layers, batch, len(self), -1, channels).permute(2, 0, 1, 3, 4)
        states = self._linear("fusion.out_proj", split)
        prompts = self._of["fusion.prompts"]  # [W, L, 1, P, prompt_dim]
        if prompts.shape[-1] == channels:
            # W (a + p) + b is (W a + b) + W p: the prompts are projected once, not per image.
            states = states + self._product("fusion.out_proj", prompts)
        else:
            states = states + prompts
        return states if keep is None else states * keep

    def _embed(self, pixels: Tensor) -> Tensor:
        """Tokens [W, B, T, S] of pixels [W, B, 3, h, w], class token first."""
        (rows, columns), (height, width) = self._side_grid, self._patch_size
        models, batch = pixels.shape[:2]
        patches = pixels.reshape(models, batch, 3, rows, height, columns, width)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(models, batch, rows * columns, -1)
        embedded = self._linear("side.patch_embed", patches)
        class_token = self._of["side.cls_token"].expand(-1, batch, -1, -1)
        return torch.cat((class_token, embedded), dim=2) + self._of["side.positions"]

    def _layers_model_by_model(self, tokens: Tensor, states: Tensor | None) -> Tensor:
        """The class tokens [W, B, 1, S] after all layers, each model's by an op of its own."""
        names = [
            f"side.layers.{layer}.{part}.{kind}"
            for layer in range(self._num_layers)
            for part in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
            for kind in ("weight", "bias")
        ]
        of_models = zip(*(self._of[name].unbind(0) for name in names), strict=True)
        size, outputs = len(SideWeights._fields), []
        for model, weights in enumerate(of_models):
            layers = [
                SideWeights(*weights[first : first + size])
                for first in range(0, len(weights), size)
            ]
            own = None if states is None else states[model]
            heads, eps = self.spec.num_heads, self.config.layer_norm_eps
            outputs.append(run_layers(tokens[model], own, layers, heads, eps, 1))
        return torch.stack(outputs)

    def _layer(self, name: str, tokens: Tensor, prompts: Tensor | None, queries: int) -> Tensor:
        """The first ``queries`` tokens [W, B, queries, S] after one layer."""
        eps = self.config.layer_norm_eps
        seen = tokens if prompts is None else torch.cat((tokens, prompts), dim=2)
        attended = self._attend(name, self._norm(f"{name}.norm1", seen, eps), queries)
        tokens = tokens[:, :, :queries] + self._linear(f"{name}.proj", attended)
        hidden = self._linear(f"{name}.fc1", self._norm(f"{name}.norm2", tokens, eps))
        return tokens + self._linear(f"{name}.fc2", functional.gelu(hidden))

    def _attend(self, name: str, seen: Tensor, queries: int) -> Tensor:
        models, batch, length, width = seen.shape
        heads = self.spec.num_heads
        qkv = self._linear(f"{name}.qkv", seen)
        split = qkv.view(models * batch, length, 3, heads, width // heads)
        q, k, v = (part.transpose(1, 2) for part in split.unbind(2))
        out = side_attention(q[:, :, :queries], k, v)
        return out.transpose(1, 2).reshape(models, batch, queries, width)

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        """Each model's own linear layer: [W, ..., in] -> [W, ..., out]."""
        weight, bias = self._of[f"{name}.weight"], self._of[f"{name}.bias"]
        flat = inputs.flatten(1, -2)
        out = torch.baddbmm(bias.unsqueeze(1), flat, weight.transpose(1, 2))
        return out.view(*inputs.shape[:-1], -1)

    def _product(self, name: str, inputs: Tensor) -> Tensor:
        """Like ``_linear``, without the bias."""
        weight = self._of[f"{name}.weight"]
        out = torch.bmm(inputs.flatten(1, -2), weight.transpose(1, 2))
        return out.view(*inputs.shape[:-1], -1)

    def _norm(self, name: str, inputs: Tensor, eps: float) -> Tensor:
        """Each model's own LayerNorm over the last axis of [W, ..., width]."""
        shape = (len(self), *(1,) * (inputs.ndim - 2), inputs.shape[-1])
        normed = functional.layer_norm(inputs, inputs.shape[-1:], eps=eps)
        weight, bias = self._of[f"{name}.weight"].view(shape), self._of[f"{name}.bias"].view(shape)
        return torch.addcmul(bias, normed, weight)

    def _bind(self) -> None:
        """Name the parts of the buffers; those of the weights are leaves of autograd."""
        self._of = {name: part.requires_grad_() for name, part in self._parts(self.weights).items()}
        self._gradient_of = self._parts(self.gradients)

    def _parts(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views [W, ...] of a buffer [W, n], by parameter name."""
        parts = torch.split(buffer, [shape.numel() for shape in self._shapes.values()], 1)
        return {
            name: part.view(len(buffer), *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


def _flatten(model: FptModel) -> Tensor:
    return torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])


def _check_equal(first: FptModel, model: FptModel) -> None:
    for name in ("config", "spec", "num_outputs"):
        if getattr(first, name) != getattr(model, name):
            raise ValueError(
                f"models of one stack must have the same {name}, got {getattr(first, name)!r} and "
                f"{getattr(model, name)!r}; put them into two stacks"
            )
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    if frozen:
        raise ValueError(
            f"all parameters of a stacked model are trained, got frozen {', '.join(frozen)}"
        )
