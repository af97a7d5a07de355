"""Set before anything imports triton or starts a thread: see DESIGN.md section 7."""

import os

# `make device` sets it to 0; unset means that kernels run in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tiny shapes lose time to threads, and pytest-xdist runs several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from helpers import (
    GOLDEN_NAMES,
    Golden,
    deselect_gpu_tests,
    implementation,
    load_golden,
    tiny_vit,
    write_image_set,
)

if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton") is not None:
    from interpreter import patch_each_module_once_a_launch

    patch_each_module_once_a_launch()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselect_gpu_tests(config, items)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of ``implementations_here(op)``, by ``indirect=["impl"]``."""
    with implementation(request.param) as name:
        yield name


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden file in turn: ``golden["scores"]``, ``golden.group("frozen")``, ``.config``."""
    return load_golden(request.param)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder ``train|val|test/<class>/<number>.png`` of tiny images; names repeat."""
    return write_image_set(tmp_path / "images")


@pytest.fixture
def make_image_set(tmp_path: Path) -> Callable[..., Path]:
    """``write_image_set`` below ``tmp_path``: ``make_image_set("name", classes=…, counts=…)``."""

    def make(name: str = "images", **settings: object) -> Path:
        return write_image_set(tmp_path / name, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def tiny_backbone() -> VisionTransformer:
    """A random timm ViT: 32 px, patch 8, width 48, 3 heads, 4 layers."""
    return tiny_vit()
