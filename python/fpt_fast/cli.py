"""The ``fpt-fast`` command: arguments in, exit status out.  No logic beyond that."""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg, subcommand

from fpt_fast import __version__
from fpt_fast.cache_settings import EightBitDtype, ImportSettings, RepairSettings
from fpt_fast.first_look import look
from fpt_fast.interrupts import Stopped
from fpt_fast.records import Split
from fpt_fast.run_settings import SweepSettings, TrainSettings
from fpt_fast.setting_values import read_yaml
from fpt_fast.settings import (
    DoctorSettings,
    EvaluateSettings,
    ExplainSettings,
    ExportSettings,
    PredictSettings,
    PreloadSettings,
    ShareSettings,
)
from fpt_fast.words import counted, format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInspect:
    """Say what a feature cache holds, how it was made, and whether it is complete."""

    cache: Positional[Path]
    """Directory of the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheVerify:
    """Read every record of a feature cache and compare its checksum."""

    cache: Positional[Path]
    """Directory of the cache."""
    workers: int = 2
    """Threads that read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConvert:
    """Write the features of a float16 cache into a new cache of 8 bits, half as large."""

    source: Positional[Path]
    """Directory of the cache to read; it stays as it is."""
    target: Positional[Path]
    """Directory of the cache to write; an unfinished one is resumed."""
    dtype: EightBitDtype = "int8"
    """What the new cache keeps keys and values in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compare:
    """Test whether two runs differ on the images that both predicted (DeLong, paired bootstrap);
    or, with --output PAGE.html, show any number of runs, or sweeps, side by side."""

    runs: Positional[tuple[Path, ...]]
    """Directories of two runs; for a page of two or more, or of sweeps and cross-validations."""
    split: Split | None = None
    """Compare what evaluate wrote for this split, instead of what train did."""
    level: float = 0.95
    """Level of the confidence intervals."""
    resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    output: Path | None = None
    """File to write as well: .html, a page of all runs; else JSON."""
    pictures: int = 60
    """Images to show on a page, of those on which the runs disagree."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """Say what is installed here and what it can run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """Needle in a haystack: preload, train FPT+ and two comparisons, write a report."""

    output: Path = Path("demo-output")
    """Directory for images, cache, runs and report."""
    images: int = 800
    """Images to make."""
    epochs: int = 20
    """Passes over the training images."""
    seed: int = 0
    """Seed of data and training."""


CacheCommand = (
    Annotated[CacheInspect, subcommand("inspect")]
    | Annotated[CacheVerify, subcommand("verify")]
    | Annotated[CacheConvert, subcommand("convert")]
    | Annotated[RepairSettings, subcommand("repair")]
    | Annotated[ImportSettings, subcommand("import-reference")]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Look into, check, convert, repair or import a feature cache."""

    command: Annotated[CacheCommand, arg(name="")]


Command = (
    Annotated[PreloadSettings, subcommand("preload")]
    | Annotated[TrainSettings, subcommand("train")]
    | Annotated[SweepSettings, subcommand("sweep")]
    | Annotated[EvaluateSettings, subcommand("evaluate")]
    | Annotated[PredictSettings, subcommand("predict")]
    | Annotated[ExplainSettings, subcommand("explain")]
    | Annotated[ExportSettings, subcommand("export")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Cache, subcommand("cache")]
    | Annotated[DoctorSettings, subcommand("doctor")]
    | Annotated[ShareSettings, subcommand("share")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Demo, subcommand("demo")]
)

_OF_SEVERAL_PROCESSES = (PreloadSettings, TrainSettings, EvaluateSettings)

WITH_CONFIG: dict[str, type[Any]] = {
    "preload": PreloadSettings,
    "train": TrainSettings,
    "sweep": SweepSettings,
    "evaluate": EvaluateSettings,
    "predict": PredictSettings,
    "explain": ExplainSettings,
    "doctor": DoctorSettings,
    "share": ShareSettings,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 refused or failed, 130 stopped)."""
    # Of other libraries warnings only: an exporter alone tells hundreds of steps.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    own = logging.getLogger("fpt_fast")
    own.setLevel(min(own.level or logging.INFO, logging.INFO))
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        sys.stdout.write(f"fpt-fast {__version__}\n")
        return 0
    try:
        command = _parse(given)
        return _run(command)
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough.
        sys.stderr.close()
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if logging.getLogger("fpt_fast").isEnabledFor(logging.DEBUG):
            raise
        sys.stderr.write(f"fpt-fast{_rank()}: {error}\n")
        return 130 if isinstance(error, Stopped) else 1
    except KeyboardInterrupt:
        sys.stderr.write("fpt-fast: stopped\n")
        return 130


def _parse(given: list[str]) -> Any:
    """Flags over ``--config FILE.yaml`` over defaults."""
    if given and given[0] in WITH_CONFIG:
        settings = WITH_CONFIG[given[0]]
        rest, config = _take_config(given[1:])
        default = None if config is None else _partial(settings, read_yaml(config, settings))
        return tyro.cli(
            settings, args=rest, default=default, prog=f"fpt-fast {given[0]}", config=_TYRO
        )
    return tyro.cli(
        Command,
        args=given,
        prog="fpt-fast",
        description="Fine-grained Prompt Tuning, FPT and FPT+; every command takes --help. "
        "--version says which version this is, info what it can run.",
        config=_TYRO,
    )


_TYRO = (tyro.conf.OmitSubcommandPrefixes,)


def _take_config(given: list[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    config: Path | None = None
    words = iter(given)
    for word in words:
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise ValueError("--config needs the path of a YAML file")
            config = Path(value)
        elif word.startswith("--config="):
            config = Path(word.removeprefix("--config="))
        else:
            rest.append(word)
    return rest, config


def _partial(settings: type[Any], values: dict[str, Any]) -> Any:
    """Defaults for tyro from a file: what the file leaves out and must be given stays missing."""
    for field in dataclasses.fields(settings):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in values:
            values[field.name] = tyro.MISSING
    return settings(**values)


def _run(command: Any) -> int:
    """Call the one function that a command stands for, and print what it returns."""
    look(command)
    from fpt_fast import pipeline
    from fpt_fast.distributed import refuse_several

    if not isinstance(
        command, PreloadSettings | TrainSettings | EvaluateSettings | PredictSettings
    ):
        refuse_several(f"fpt-fast {type(command).__name__.removesuffix('Settings').lower()}")
    match command:
        case Cache():
            return _run_cache(command.command)
        case PreloadSettings():
            done = pipeline.preload(command)
            _say(
                f"preloaded {done.computed} of {counted(done.images, 'image')} into {done.cache} "
                f"({format_bytes(done.bytes)}, {done.seconds:.0f} s)"
            )
        case TrainSettings():
            result = pipeline.train(command)
            _say(f"{result.split}: {result.metrics}\nreport: {result.report}")
        case SweepSettings():
            swept = pipeline.sweep(command)
            _say(f"{swept}best single model on its own validation images: {swept.best}")
            _say(f"models: {swept.folder}")
        case EvaluateSettings():
            _say(f"{command.split}: {pipeline.evaluate(command)}")
        case PredictSettings():
            predicted = pipeline.predict(command)
            count = len(predicted.predictions.keys)
            _say(f"{counted(count, 'prediction')} written to {predicted.output}")
        case DoctorSettings():
            diagnosis = pipeline.doctor(command)
            _say(str(diagnosis))
            return 0 if diagnosis.ok else 1
        case ShareSettings():
            shared = pipeline.share(command)
            _say(f"shared as {' and '.join(str(x) for x in (shared.folder, shared.address) if x)}")
        case ExplainSettings():
            explained = pipeline.explain(command)
            _say(f"{counted(len(explained.examples), 'image')} explained in {explained.output}")
        case ExportSettings():
            _say(str(pipeline.export(command)))
        case Compare():
            _say(_compare(command))
        case Info():
            from fpt_fast.info import describe_installation

            _say(describe_installation())
        case Demo():
            from fpt_fast.demo.run import run_demo

            _say(
                run_demo(
                    command.output,
                    images=command.images,
                    epochs=command.epochs,
                    seed=command.seed,
                ).summary()
            )
    return 0


def _compare(command: Compare) -> str:
    from fpt_fast import pipeline

    options: dict[str, Any] = {
        name: getattr(command, name) for name in ("split", "level", "resamples")
    }
    if command.output is not None and command.output.suffix.lower() in (".html", ".htm"):
        runs, output = command.runs, command.output
        return str(pipeline.compare_runs(runs, output=output, pictures=command.pictures, **options))
    if len(command.runs) != 2:
        raise ValueError(
            f"without --output PAGE.html, compare takes two runs, got {len(command.runs)}; name "
            "two, or the page to write"
        )
    return str(pipeline.compare(*command.runs, output=command.output, **options))


def _run_cache(command: Any) -> int:
    from fpt_fast import pipeline

    match command:
        case CacheInspect():
            _say(str(pipeline.inspect_cache(command.cache)))
        case CacheVerify():
            report = pipeline.verify_cache(command.cache, workers=command.workers)
            _say(str(report))
            return 0 if report.ok else 1
        case CacheConvert():
            done = pipeline.convert(
                source=command.source, target=command.target, dtype=command.dtype
            )
            _say(
                f"converted {done.converted} of {counted(done.images, 'record')} into {done.cache} "
                f"({format_bytes(done.bytes_before)} -> {format_bytes(done.bytes_after)}, "
                f"{done.seconds:.0f} s)"
            )
        case RepairSettings():
            bad, report = pipeline.repair(command)
            _say(f"rebuilt {counted(len(bad), 'record')}\n{report}")
            return 0 if report.ok else 1
        case ImportSettings():
            imported = pipeline.import_reference(command)
            _say(f"imported {counted(imported.images, 'image')} into {command.cache}")
            for difference in imported.differences:
                _say(f"differs: {difference}")
    return 0


def _say(text: str) -> None:
    """Once, by the first of several processes."""
    from fpt_fast.distributed import is_first_process

    if is_first_process():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _rank() -> str:
    """Which of several processes this is."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "" if size == "1" else f" (rank {os.environ.get('RANK')} of {size})"


if __name__ == "__main__":
    sys.exit(main())
