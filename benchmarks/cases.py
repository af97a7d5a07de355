"""Shapes that the tests and the benchmarks of the ops share, and what they cost.

Axis letters as in ``fpt_fast/records.py``.  Small shapes are odd on purpose: nothing divides
anything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fpt_fast.ops.implementation import implementations


@dataclass(frozen=True)
class FrozenCase:
    """Self-attention of one frozen layer, ``keep`` of whose tokens are kept."""

    name: str
    images: int
    heads: int
    tokens: int
    width: int
    keep: int

    def qkv(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D] as a frozen layer has them: views of one packed projection."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.images, self.tokens, 3, self.heads, self.width)
        packed = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return q, k, v

    @property
    def map_flops(self) -> int:
        """Multiplications and additions of one product with the attention map."""
        return 2 * self.images * self.heads * self.tokens**2 * self.width

    @property
    def map_exponentials(self) -> int:
        """Elements of the attention map."""
        return self.images * self.heads * self.tokens**2


@dataclass(frozen=True)
class PromptCase:
    """Attention of the prompts of ``layers`` layers to the ``kept`` tokens of ``images`` images."""

    name: str
    images: int
    layers: int
    heads: int
    kept: int
    width: int
    prompts: int

    def q(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Queries of the prompts [L, H, P, D]."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.layers, self.heads, self.prompts, self.width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def kv(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """Kept keys and values [B, L, 2, H, K, D]."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.images, self.layers, 2, self.heads, self.kept, self.width)
        return torch.randn(shape, generator=generator).to(dtype)

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of both products."""
        return 4 * self.images * self.layers * self.heads * self.prompts * self.kept * self.width

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values."""
        numel = self.images * self.layers * 2 * self.heads * self.kept * self.width
        return numel * dtype.itemsize


FROZEN_CASES = (
    FrozenCase("odd", images=2, heads=3, tokens=37, width=10, keep=7),
    FrozenCase("one_token", images=1, heads=2, tokens=1, width=5, keep=1),
    FrozenCase("width_1", images=1, heads=1, tokens=17, width=1, keep=17),
    FrozenCase("64_patches", images=1, heads=3, tokens=65, width=64, keep=13),
    FrozenCase("several_blocks", images=1, heads=2, tokens=601, width=24, keep=120),
)
FULL_FROZEN_CASES = (FrozenCase("vit_b_512px", 1, 12, 1025, 64, 205),)

PROMPT_CASES = (
    PromptCase("odd", images=3, layers=2, heads=3, kept=7, width=10, prompts=5),
    PromptCase("one_of_each", images=1, layers=1, heads=1, kept=1, width=1, prompts=1),
    PromptCase("many_kept", images=2, layers=3, heads=2, kept=205, width=64, prompts=16),
)
FULL_PROMPT_CASES = (PromptCase("fpt_plus_vit_b_512px", 16, 6, 12, 205, 64, 16),)


def frozen_case(full: bool) -> FrozenCase:
    """The case that benchmarks measure."""
    return FULL_FROZEN_CASES[0] if full else FROZEN_CASES[0]


def prompt_case(full: bool) -> PromptCase:
    """The case that benchmarks measure."""
    return FULL_PROMPT_CASES[0] if full else PROMPT_CASES[0]


def cpu_implementations(op: str) -> list[str]:
    """Implementations that run on the CPU; interpreted, a Triton kernel's time says nothing."""
    return [impl for impl in implementations(op) if impl != "triton"]
