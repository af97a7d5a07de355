"""The phases of a run, in order of worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import Sizes
from benchmarks.counts import H200, Ceilings
from benchmarks.device.report import Report
from benchmarks.device.schedule import Phase

# In order of worth, with their shares of the time.
SHARES = {
    "environment": 4.0,
    "gpu_tests": 24.0,
    "races": 10.0,
    "ops": 22.0,
    "models": 10.0,
    "steps": 12.0,
    "sanitizer": 8.0,
    "tuning": 14.0,
    "rivals": 12.0,
}


@dataclass(frozen=True)
class Options:
    """Of one run; ``folder`` takes logs, ``wanted`` names phases."""

    is_dry: bool
    wanted: Sequence[str]
    folder: Path
    report: Report

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU of a dry run."""
        return torch.device("cpu" if self.is_dry else "cuda")

    @property
    def sizes(self) -> Sizes:
        """Sizes of the contests."""
        return Sizes("dry" if self.is_dry else "gpu", self.device)

    @property
    def ceilings(self) -> Ceilings:
        """As measured in this run; those of an H200 where they were not."""
        measured = dict(self.report.results("environment"))
        if "ceilings" not in measured:
            return H200
        found = measured["ceilings"]
        return Ceilings(found["bandwidth"], found["flops"], found["exponentials"])


def phases(options: Options) -> list[Phase]:
    """Those wanted, with what fills them imported only when their turn comes."""

    def lazily(module: str) -> Phase:
        def items() -> Sequence[object]:
            from importlib import import_module

            return import_module(f"benchmarks.device.{module}").items(options)

        return Phase(module, SHARES[module], items)  # type: ignore[arg-type]

    return [lazily(name) for name in SHARES if name in options.wanted]
