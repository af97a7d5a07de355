"""``modules.bridge`` of the authors' code: the fusion module, and the model around it."""

import torch
from torch import Tensor, nn

from fpt_fast.fusion import PromptFusion


class FusionModule(PromptFusion):
    """The authors' fusion module: signature, parameter names and result are theirs.

    ``p_dropout`` applies to the states.  Raises ``ValueError`` for widths that do not fit.
    """

    def __init__(
        self,
        num_layers: int,
        in_dim: int,
        out_dim: int,
        num_heads: int,
        num_prompts: int,
        prompt_dim: int | None = None,
        prompt_norm: bool = True,
        prompt_proj: bool = False,
        p_dropout: float = 0.5,
    ) -> None:
        super().__init__(
            num_layers=num_layers,
            frozen_width=in_dim,
            side_width=out_dim,
            num_heads=num_heads,
            num_prompts=num_prompts,
            prompt_dim=prompt_dim,
            prompt_norm=prompt_norm,
            prompt_proj=prompt_proj,
            dropout=p_dropout,
        )
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.head_size = in_dim // num_heads
        self.prompt_dim = in_dim if prompt_dim is None else prompt_dim

    def forward(self, key_layer: Tensor, value_layer: Tensor) -> Tensor:  # type: ignore[override]
        """Return the states ``[L, B, P, S]`` of ``key_layer``, ``value_layer`` [L, B, H, K, D].

        The frozen model's keys and values get no gradient: ones that require it are refused with
        ``ValueError``, as are shapes that do not fit the module.
        """
        if key_layer.shape != value_layer.shape or key_layer.ndim != 5:
            raise ValueError(
                "key_layer and value_layer must both be [L, B, H, K, D], got "
                f"{tuple(key_layer.shape)} and {tuple(value_layer.shape)}"
            )
        if key_layer.requires_grad or value_layer.requires_grad:
            raise ValueError(
                "key_layer and value_layer must not require grad, since the frozen model is not "
                "trained; run it under torch.no_grad()"
            )
        kv = torch.stack((key_layer.transpose(0, 1), value_layer.transpose(0, 1)), dim=2)
        return super().forward(kv)


class FineGrainedPromptTuning(nn.Module):
    """The authors' model: ``side_encoder`` looks at the small image and the fusion's states."""

    def __init__(self, side_encoder: nn.Module, fusion_module: nn.Module) -> None:
        super().__init__()
        self.side_encoder = side_encoder
        self.fusion_module = fusion_module

    def forward(self, x_coarse: Tensor, key_states: Tensor, value_states: Tensor) -> Tensor:
        """Return logits ``[B, outputs]``.

        ``x_coarse`` [B, 3, h, w]; ``key_states`` and ``value_states`` [L, B, H, K, D].
        """
        states = self.fusion_module(key_states, value_states)
        output = self.side_encoder(x_coarse, states, interpolate_pos_encoding=True)
        logits: Tensor = output.logits
        return logits
