"""What a sweep tries: each trial is one model's method and recipe, under a name."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fpt_fast.config import ConfigError, FptConfig, TrainConfig

# Settings that the models of one sweep may differ in, and how a trial's name writes them.
AXES: Mapping[str, str] = {
    "learning_rate": "lr",
    "weight_decay": "wd",
    "num_prompts": "prompts",
    "seed": "seed",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One model of a sweep; ``values`` are those of the settings that vary, by name."""

    name: str
    method: FptConfig
    recipe: TrainConfig
    values: dict[str, float]

    @property
    def setting(self) -> tuple[tuple[str, float], ...]:
        """What varies but for the seed: trials with equal settings are repeats of one another."""
        return tuple((name, value) for name, value in self.values.items() if name != "seed")


def make_trials(
    method: FptConfig, recipe: TrainConfig, axes: Mapping[str, Sequence[float]]
) -> tuple[Trial, ...]:
    """All combinations of ``axes`` (values by the names of ``AXES``), seeds fastest.

    Raises ``ConfigError`` for an axis without values or with a value twice.
    """
    for name, listed in axes.items():
        if name not in AXES:
            raise ConfigError(f"a sweep may vary {', '.join(AXES)}, got {name!r}")
        if not listed or len(set(listed)) != len(listed):
            raise ConfigError(f"{name} must list different values, got {list(listed)}")
    names = [name for name in AXES if name in axes]
    varying = [name for name in names if len(axes[name]) > 1] or names[:1]
    trials = []
    for combination in itertools.product(*(axes[name] for name in names)):
        values = dict(zip(names, combination, strict=True))
        shown = "-".join(f"{AXES[name]}{_short(values[name])}" for name in varying)
        trials.append(
            Trial(
                name=shown or "model",
                method=replace(method, **_of_method(values)),  # type: ignore[arg-type]
                recipe=replace(recipe, **_of_recipe(values)),  # type: ignore[arg-type]
                values={name: values[name] for name in varying},
            )
        )
    return tuple(trials)


def parse_numbers(name: str, text: str) -> tuple[float, ...]:
    """Read ``5e-5,1e-4`` or, for whole numbers, ``0-4`` or ``0,3-5``.

    Raises ``ConfigError`` for anything else.
    """
    numbers: list[float] = []
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
            numbers.extend(range(int(first), int(last) + 1))
            continue
        try:
            numbers.append(int(part) if part.isdecimal() else float(part))
        except ValueError:
            raise ConfigError(
                f"{name} must list numbers like 5e-5,1e-4, or whole numbers like 0-4, got {text!r}"
            ) from None
    return tuple(numbers)


def _of_method(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _whole(name, values[name]) for name in ("num_prompts",) if name in values}


def _of_recipe(values: Mapping[str, float]) -> dict[str, float]:
    names = ("learning_rate", "weight_decay")
    changes = {name: float(values[name]) for name in names if name in values}
    return changes | {name: _whole(name, values[name]) for name in ("seed",) if name in values}


def _whole(name: str, value: float) -> int:
    if int(value) != value or value < 0:
        raise ConfigError(f"{name} must be a whole number, got {value}")
    return int(value)


def _short(value: float) -> str:
    """A number as a file name may hold it: 0.0001 is ``1e-4``."""
    if isinstance(value, int) or value == 0:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    if -3 < int(exponent) < 5:
        return f"{value:g}"
    return f"{float(mantissa):g}e{int(exponent)}"


def distinct_seeds(trials: Sequence[Trial]) -> Iterator[int]:
    """Seeds of the trials, each once, in order of appearance."""
    yield from dict.fromkeys(trial.recipe.seed for trial in trials)
