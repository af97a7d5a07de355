"""What several test files share: golden vectors, error budgets, tiny images and backbones."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import FrozenCase
from fpt_fast.ops.implementation import implementations
from fpt_fast.ops.native_reasons import native_levels, native_missing
from fpt_fast.records import BackboneSpec

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_NAMES = ("fpt_plus_global", "fpt_class_token", "fpt_global_unequal")


@dataclass(frozen=True)
class Golden:
    """One file of golden vectors: what the authors' code computed on a small random model."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors named ``prefix + '.' + rest``, by ``rest``."""
        head = prefix + "."
        return {k.removeprefix(head): v for k, v in self.tensors.items() if k.startswith(head)}


def load_golden(name: str) -> Golden:
    """Read one of ``GOLDEN_NAMES``; every call gives fresh tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        return Golden(name, config, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, in fp64; shapes must agree."""
    assert out.shape == expected.shape, f"{tuple(out.shape)} is not {tuple(expected.shape)}"
    difference = out.detach().double() - expected.detach().double()
    norm = expected.detach().double().norm()
    return float(difference.norm() / norm) if norm > 0 else float(difference.norm())


def assert_within_budget(out: Tensor, oracle: Tensor, eager: Tensor, factor: float = 2.0) -> None:
    """The error budget of DESIGN.md section 4; ``factor`` is 2, and 3 for gradients.

    ``oracle`` is fp64, ``eager`` the plain PyTorch expression in the precision of the inputs.
    The largest error and the root mean square both answer to ``factor`` times that of ``eager``
    plus one rounding unit of ``out``'s dtype, so that neither one bad element nor a small error
    of scale slips through.
    """
    assert oracle.dtype == torch.float64, f"the oracle must be fp64, got {oracle.dtype}"
    assert out.shape == oracle.shape == eager.shape, (out.shape, oracle.shape, eager.shape)
    assert bool(out.isfinite().all()), "the result has values that are not finite"
    unit = torch.finfo(out.dtype).eps / 2
    out_error, eager_error = (out.double() - oracle).abs(), (eager.double() - oracle).abs()
    for name, measure in (("largest", torch.amax), ("root mean square", _root_mean_square)):
        got = float(measure(out_error))
        allowed = factor * float(measure(eager_error)) + unit * float(measure(oracle.abs()))
        assert got <= allowed, f"{name} error {got:.3e} exceeds the budget {allowed:.3e}"


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


VIT_B = BackboneSpec(
    name="vit_base_patch16_384",
    weights_hash="0" * 32,
    hidden_size=768,
    num_heads=12,
    depth=12,
    patch_size=(16, 16),
    prefix_tokens=1,
    has_class_token=True,
    image_size=(384, 384),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

TINY_SPEC = dataclasses.replace(
    VIT_B, hidden_size=48, num_heads=3, depth=4, patch_size=(8, 8), image_size=(32, 32)
)


def tiny_vit(**changes: Any) -> VisionTransformer:
    """A random timm ViT in eval mode: 32 px, patch 8, width 48, 3 heads, 4 layers (N = 17)."""
    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(changes.pop("seed", 0))
        return VisionTransformer(**{**settings, **changes}).eval()


def spread_weights(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Give every parameter random values well away from zero, so that nothing hides in an init."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(scale * noise.to(parameter))
    return module


def class_image(label: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise with a bright bar whose place and colour tell the class: [h, w, 3] u8."""
    height, width = size
    pixels = rng.integers(40, 120, size=(height, width, 3), dtype=np.uint8)
    top = (label * height // 4) % height
    pixels[top : top + max(1, height // 4), :, label % 3] = 250
    return pixels


def write_image(path: Path, pixels: np.ndarray) -> Path:
    """Write [h, w] or [h, w, 3] u8 in the format of the suffix, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_image_set(
    root: Path,
    classes: Sequence[str] = ("healthy", "mild", "severe"),
    counts: dict[str, int] | None = None,
    size: tuple[int, int] = (48, 40),
    seed: int = 0,
) -> Path:
    """Write ``root/<split>/<class>/<number>.png``; ``counts`` is images per class by split.

    With ``counts={"": n}`` there is no split level: ``root/<class>/<number>.png``.  Numbers
    start at 0 in every folder, so that names repeat between classes and splits.
    """
    rng = np.random.default_rng(seed)
    for split, count in (counts or {"train": 4, "val": 2, "test": 2}).items():
        for label, name in enumerate(classes):
            for number in range(count):
                path = root / split / name / f"{number}.png"
                write_image(path, class_image(label, size, rng))
    return root


def implementations_here(op: str) -> list[str]:
    """Implementations of ``op``; ``native/<level>`` for every level of it that runs here.

    tests/test_native.py sees to it that ``native`` is there where a compiler is.
    """
    levels = [] if native_missing() else native_levels().split(", ")
    return [
        name
        for impl in implementations(op)
        for name in ([f"native/{level}" for level in levels] if impl == "native" else [impl])
    ]


def budget_cases(
    cases: Sequence[FrozenCase], implementations: Sequence[str], dtypes: Sequence[torch.dtype]
) -> list[tuple[FrozenCase, str, torch.dtype]]:
    """Every combination, but for many tokens of f32 in Triton's interpreter: hundreds of small
    tiles take seconds, and tests/kernels has f32 in several blocks with a tail."""
    return [
        (case, impl, dtype)
        for case in cases
        for impl in implementations
        for dtype in dtypes
        if impl != "triton" or case.tokens < 100 or dtype != torch.float32
    ]


@contextmanager
def implementation(name: str) -> Iterator[str]:
    """Set the level of ``native/<level>``; yields what an op's ``impl`` argument takes."""
    impl, _, level = name.partition("/")
    before = os.environ.get("FPT_NATIVE_LEVEL")
    os.environ["FPT_NATIVE_LEVEL"] = level
    try:
        yield impl
    finally:
        if before is None:
            del os.environ["FPT_NATIVE_LEVEL"]
        else:
            os.environ["FPT_NATIVE_LEVEL"] = before


def deselect_gpu_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a GPU can run on a machine without one, and say how many.

    Of the tests marked ``gpu``, those with the fixture ``device`` (tests/gpu) run anywhere.
    """
    if torch.cuda.is_available():
        return
    dropped = [
        item
        for item in items
        if item.get_closest_marker("gpu") and "device" not in getattr(item, "fixturenames", ())
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def assert_tensors_equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
    """Same number of tensors, each bit-equal in shape, dtype and values."""
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        assert torch.equal(a, b), f"differ in {int((a != b).sum())} of {a.numel()} values"


class SeenOps(TorchDispatchMode):
    """``seen``: names of the ops that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))
