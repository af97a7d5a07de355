"""Fusion of the frozen model's features: learned prompts attend to the kept tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fpt_fast.ops import prompt_attention, trained_linear
from fpt_fast.ops.modules import is_trained_linear

# As published: so close to zero that training starts from the plain mean of the kept values.
_PROMPT_STD = 1e-6


class PromptFusion(nn.Module):
    """Learned prompts ``[L, 1, P, prompt_dim]`` read the kept keys and values of ``L`` layers.

    With ``prompt_dim`` equal to ``frozen_width`` (FPT+) the prompts are added before the output
    projection: ``out_proj(attention + prompts)``; with any other ``prompt_dim`` (FPT, where it is
    ``side_width``) after it: ``out_proj(attention) + prompts``.  ``prompt_norm`` normalises the
    prompts, ``prompt_proj`` projects them to ``frozen_width``, before they become queries.  Norm
    and projections are shared by all layers.

    ``impl`` names the implementation of ``fpt_fast.ops.prompt_attention``; it may be set at any
    time.  Parameter names are those of the published code.  Raises ``ValueError`` for widths that
    do not fit together.
    """

    def __init__(
        self,
        num_layers: int,
        frozen_width: int,
        side_width: int,
        num_heads: int,
        num_prompts: int,
        prompt_dim: int | None = None,
        prompt_norm: bool = True,
        prompt_proj: bool = False,
        dropout: float = 0.5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        width = frozen_width if prompt_dim is None else prompt_dim
        _check_at_least_one(
            num_layers=num_layers,
            frozen_width=frozen_width,
            side_width=side_width,
            num_heads=num_heads,
            num_prompts=num_prompts,
            prompt_dim=width,
        )
        if frozen_width % num_heads:
            raise ValueError(
                f"num_heads must divide the frozen width {frozen_width}, got {num_heads}"
            )
        if width != frozen_width and not prompt_proj:
            raise ValueError(
                f"prompt_proj must be True where the prompts' width {width} is not the frozen "
                f"width {frozen_width}, got False"
            )
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.num_prompts = num_prompts
        self.frozen_width = frozen_width
        self.impl = impl
        self.adds_before_projection = width == frozen_width

        self.prompts = nn.Parameter(torch.empty(num_layers, 1, num_prompts, width))
        nn.init.normal_(self.prompts, std=_PROMPT_STD)
        self.layer_norm = nn.LayerNorm(width) if prompt_norm else nn.Identity()
        self.prompt_proj = nn.Linear(width, frozen_width) if prompt_proj else nn.Identity()
        self.out_proj = nn.Linear(frozen_width, side_width)
        self.dropout = _StatesDropout(dropout)

    def queries(self) -> Tensor:
        """Return the queries ``[L, H, P, D]``, the same for every image of a step."""
        q: Tensor = self.prompt_proj(self.layer_norm(self.prompts))  # [L, 1, P, C]
        shape = (self.num_layers, self.num_prompts, self.num_heads, -1)
        return q.to(query_dtype(self.prompts)).view(shape).transpose(1, 2)

    def forward(
        self, kv: Tensor, rows: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return the states ``[L, B, P, S]`` that the side network's layers see.

        ``kv`` [M, L, 2, H, K, D], any dtype that ``fpt_fast.ops.prompt_attention`` reads;
        ``rows`` [B] picks the batch out of it, None takes all ``M`` in their order; ``scales``
        ([M, L, H, D], [M, L, H, K]) f32 belong to 8-bit ``kv`` (``quantise_kv``).  Raises
        ``ValueError`` where ``kv`` was not extracted for this module's layers, heads and width.
        """
        self.check(kv)
        return self.project(prompt_attention(self.queries(), kv, rows, scales, impl=self.impl))

    def project(self, attended: Tensor) -> Tensor:
        """Add the prompts to ``attended`` [L, B, P, C] and project it: states [L, B, P, S]."""
        project, adds_before = self.out_proj, self.adds_before_projection
        if is_trained_linear(project, attended):
            added = self.prompts if adds_before else None
            states = trained_linear(attended, project.weight, project.bias, added)
        else:
            states = project(attended)
            if adds_before:
                # W (a + p) + b is (W a + b) + W p: the prompts are projected once, not per image.
                states = states + functional.linear(self.prompts, project.weight)
        if not adds_before:
            states = states + self.prompts
        dropped: Tensor = self.dropout(states)
        return dropped

    def check(self, kv: Tensor) -> None:
        """Raise ``ValueError`` where ``kv`` [M, L, 2, H, K, D] was not made for this module."""
        head_width = self.frozen_width // self.num_heads
        if kv.ndim != 6:
            raise ValueError(f"kv must be [M, L, 2, H, K, D], got shape {tuple(kv.shape)}")
        expected = (self.num_layers, 2, self.num_heads, head_width)
        if (*kv.shape[1:4], kv.shape[5]) != expected:
            raise ValueError(
                f"kv must be [M, {self.num_layers}, 2, {self.num_heads}, K, {head_width}] for this "
                f"model, got {tuple(kv.shape)}; were the features made with other layers or by "
                "another frozen model?"
            )


class _StatesDropout(nn.Dropout):
    """Of states [L, B, P, S]: the images are along the second axis."""

    batch_dim = 1

    def forward(self, input: Tensor) -> Tensor:
        """``input``, with values at random 0 and the others larger while training."""
        if not self.training or self.p == 0:
            return input
        if self.p == 1 or torch.compiler.is_compiling():
            return super().forward(input)
        return input * self.factors(input, self.p)

    @staticmethod
    def factors(like: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
        """What ``forward`` multiplies by, in the shape, dtype and device of ``like``."""
        return dropout_factors(like, rate, generator)


def dropout_factors(like: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """0 with probability ``rate``, else ``1 / (1 - rate)``, from torch's generator or another.

    On a CPU a random byte decides, where ``rate`` is a whole number of its 256 values: torch draws
    a number for every value, which takes longer.
    """
    dropped = 256 * rate
    if not like.is_cpu or dropped != int(dropped):
        kept = torch.empty_like(like).bernoulli_(1 - rate, generator=generator)
        return kept.div_(1 - rate)
    count = like.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    kept = words.view(torch.uint8)[:count] >= int(dropped)
    return kept.view(like.shape).to(like.dtype).div_(1 - rate)


def query_dtype(prompts: Tensor) -> torch.dtype:
    """Dtype of the queries: that of the prompts.  Under autocast, too, since reading the features
    costs more than the products; but on a CPU bf16, for which there may be tiles."""
    device = prompts.device.type
    if device == "cpu" and torch.is_autocast_enabled(device):
        chosen = torch.get_autocast_dtype(device)
        return chosen if chosen == torch.bfloat16 else prompts.dtype
    return prompts.dtype


def _check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
