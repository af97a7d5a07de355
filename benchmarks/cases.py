"""Shapes that the tests and the benchmarks of the ops share, and what they cost.

Axis letters as in ``fpt_fast/records.py``.  Small shapes are odd on purpose: nothing divides
anything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fpt_fast.records import BackboneSpec

CPU = torch.device("cpu")


def vit_b(image: int) -> BackboneSpec:
    """ViT-B/16 with the positions of an ``image`` of that many pixels."""
    halves = (0.5, 0.5, 0.5)
    name = f"vit_base_patch16_{image}"
    return BackboneSpec(
        name, "0" * 32, 768, 12, 12, (16, 16), 1, True, (image, image), halves, halves
    )


@dataclass(frozen=True)
class Sizes:
    """Where and how large a contest is.

    ``dry`` (interpreted kernels), ``tiny``, ``full`` (as published, on a CPU) or ``gpu``.
    """

    size: str = "tiny"
    device: torch.device = CPU

    @property
    def frozen(self) -> "tuple[FrozenCase, ...]":
        """Frozen layers to measure."""
        cases = {"dry": DRY_FROZEN_CASES, "full": FULL_FROZEN_CASES, "gpu": GPU_FROZEN_CASES}
        return cases.get(self.size, FROZEN_CASES[:1])

    @property
    def prompt(self) -> "tuple[PromptCase, ...]":
        """Fusions to measure."""
        cases = {"dry": DRY_PROMPT_CASES, "full": FULL_PROMPT_CASES, "gpu": FULL_PROMPT_CASES}
        return cases.get(self.size, PROMPT_CASES[:1])

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class FrozenCase:
    """Self-attention of one frozen layer, ``keep`` of whose tokens are kept."""

    name: str
    images: int
    heads: int
    tokens: int
    width: int
    keep: int

    def qkv(
        self, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D] as a frozen layer has them: views of one packed projection."""
        shape = (self.images, self.tokens, 3, self.heads, self.width)
        packed = _normal(shape, seed, device).to(dtype)
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

    def q(self, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU) -> Tensor:
        """Queries of the prompts [L, H, P, D]."""
        shape = (self.layers, self.heads, self.prompts, self.width)
        return _normal(shape, seed, device).to(dtype)

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


def _normal(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """f64, or f32 on a GPU, where 150 million f64 numbers would be most of a benchmark."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if device.type == "cpu" else torch.float32
    return torch.randn(shape, generator=generator, dtype=wide, device=device)


FROZEN_CASES = (
    FrozenCase("odd", images=2, heads=3, tokens=37, width=10, keep=7),
    FrozenCase("one_token", images=1, heads=2, tokens=1, width=5, keep=1),
    FrozenCase("width_1", images=1, heads=1, tokens=17, width=1, keep=17),
    FrozenCase("64_patches", images=1, heads=3, tokens=65, width=64, keep=13),
    FrozenCase("several_blocks", images=1, heads=2, tokens=601, width=24, keep=120),
)
DRY_FROZEN_CASES = (FrozenCase("dry", 1, 1, 19, 8, 5),)
FULL_FROZEN_CASES = (FrozenCase("vit_b_512px", 1, 12, 1025, 64, 205),)
GPU_FROZEN_CASES = (
    FrozenCase("vit_b_512px_x16", 16, 12, 1025, 64, 205),
    FrozenCase("vit_b_1024px_x16", 16, 12, 4097, 64, 819),
)

PROMPT_CASES = (
    PromptCase("odd", images=3, layers=2, heads=3, kept=7, width=10, prompts=5),
    PromptCase("one_of_each", images=1, layers=1, heads=1, kept=1, width=1, prompts=1),
    PromptCase("many_kept", images=2, layers=2, heads=2, kept=205, width=64, prompts=16),
)
DRY_PROMPT_CASES = (PromptCase("dry", 2, 1, 1, 7, 8, 3),)
FULL_PROMPT_CASES = (PromptCase("fpt_plus_vit_b_512px", 16, 6, 12, 205, 64, 16),)
