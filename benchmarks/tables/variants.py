"""The rows of each table, as settings of ``preload`` and ``train``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpt_fast.config import PEER_METHODS

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
TOKEN_RATIO = 0.2
# In the order of the papers' table 1.
LABELS = {
    "full": "full fine-tuning",
    "linear": "linear probing",
    "prompt": "prompt tuning",
    "attention": "attention tuning",
    "adapter": "adapter",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "side": "ladder side-tuning",
    "fpt": "FPT",
    "fpt_plus": "FPT+",
}


@dataclass(frozen=True)
class Options:
    """What all rows of a table share; sizes in pixels.

    ``search`` are learning rates of which each row takes its best; ``rates`` are those of rows by
    name, found before, and go first.
    """

    data: Path
    output: Path
    backbone: str
    input_size: int = 512
    side_size: int | None = None
    method: str = "fpt_plus"
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float | None = None
    search: tuple[float, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    normalization: str = "auto"
    seeds: int = 3
    workers: int = 2

    @property
    def side(self) -> int:
        """The side input: as given, or the method's own."""
        return self.side_size or {"fpt": 224}.get(self.method, 128)


@dataclass(frozen=True)
class Variant:
    """One row: ``train`` settings beside those that all share, and the features that it reads.

    ``token_ratio`` is that of its cache; None trains without one.
    """

    name: str
    label: str
    method: str
    token_ratio: float | None
    train: Mapping[str, Any] = field(default_factory=dict)

    def cache(self, options: Options) -> Path | None:
        """Where its features are; rows with the same features share a cache."""
        if self.token_ratio is None:
            return None
        return options.output / "caches" / f"{self.method}-{self.token_ratio:g}"


def components(options: Options) -> Iterator[Variant]:
    """The papers' table 2: each row adds one part of the method to the one above it.

    The first two rows give the side network the frozen model's input size; rows without a cache
    run the frozen model with every batch.
    """
    full, side = {"side_size": str(options.input_size)}, {"side_size": str(options.side)}
    live = {
        "cache": "none",
        "backbone": options.backbone,
        "input_size": str(options.input_size),
        "normalization": options.normalization,
    }
    whole, kept = {"token_ratio": 1.0}, {"token_ratio": TOKEN_RATIO}

    def row(name: str, label: str, cached: float | None, train: Mapping[str, Any]) -> Variant:
        return Variant(name, label, options.method, cached, train)

    yield row("side_alone", "side network alone", TOKEN_RATIO, {"fusion": False, **full})
    yield row("fusion", "+ frozen model, fusion", None, {**live, **whole, **full})
    yield row("asymmetric", "+ asymmetric input", None, {**live, **whole, **side})
    yield row("selection", "+ token selection", None, {**live, **kept, **side})
    yield row("preloading", "+ preloading", TOKEN_RATIO, side)


def ratios(options: Options) -> Iterator[Variant]:
    """The papers' table 3: the whole method at several token ratios."""
    for ratio in RATIOS:
        label = f"{100 * ratio:.0f} %"
        name = f"ratio_{ratio:g}"
        yield Variant(name, label, options.method, ratio, {"side_size": str(options.side)})


def methods(options: Options) -> Iterator[Variant]:
    """The papers' table 1: FPT, FPT+ and every method that they are compared with.

    A learning rate that is given is that of FPT and FPT+; the others have their own.
    """
    side = {} if options.side_size is None else {"side_size": str(options.side_size)}
    for method, label in LABELS.items():
        if method in PEER_METHODS:
            yield Variant(method, label, method, None, _peer(options))
        else:
            yield Variant(method, label, method, TOKEN_RATIO, side)


def _peer(options: Options) -> dict[str, Any]:
    """A peer reads images at the frozen model's input size, and no cache."""
    return {
        "backbone": options.backbone,
        "input_size": str(options.input_size),
        "normalization": options.normalization,
        "learning_rate": None,
    }


TITLES = {"methods": "Methods", "components": "Components", "ratios": "Token ratios"}
TABLES = {"components": components, "ratios": ratios, "methods": methods}
