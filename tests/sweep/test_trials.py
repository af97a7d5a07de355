"""Which models a sweep trains, and what they are called."""

import pytest

from fpt_fast.config import ConfigError, TrainConfig, fpt_plus
from fpt_fast.sweep import distinct_seeds, make_trials, parse_numbers


def test_all_combinations_seeds_fastest() -> None:
    trials = make_trials(fpt_plus(), TrainConfig(), {"seed": (0, 1), "learning_rate": (5e-5, 1e-4)})
    assert [trial.name for trial in trials] == [
        "lr5e-5-seed0",
        "lr5e-5-seed1",
        "lr1e-4-seed0",
        "lr1e-4-seed1",
    ]
    assert [(t.recipe.learning_rate, t.recipe.seed) for t in trials] == [
        (5e-5, 0),
        (5e-5, 1),
        (1e-4, 0),
        (1e-4, 1),
    ]
    assert trials[0].setting == trials[1].setting != trials[2].setting
    assert list(distinct_seeds(trials)) == [0, 1]


def test_prompts_and_decay_reach_method_and_recipe() -> None:
    first, second, *_ = make_trials(
        fpt_plus(), TrainConfig(), {"num_prompts": (4, 8), "weight_decay": (0, 0.05)}
    )
    assert (first.method.num_prompts, first.recipe.weight_decay) == (4, 0.0)
    assert second.name == "wd0-prompts8"
    assert second.values == {"weight_decay": 0, "num_prompts": 8}
    assert {type(t.method.num_prompts) for t in (first, second)} == {int}


def test_what_does_not_vary_is_not_in_the_name() -> None:
    (only,) = make_trials(fpt_plus(), TrainConfig(), {"learning_rate": (1e-4,), "seed": (3,)})
    assert only.name == "lr1e-4" and only.recipe.seed == 3
    (bare,) = make_trials(fpt_plus(), TrainConfig(), {})
    assert bare.name == "model"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("5e-5,1e-4", (5e-5, 1e-4)), ("0-4", (0, 1, 2, 3, 4)), ("7, 3-4", (7, 3, 4)), ("0.1", (0.1,))],
)
def test_numbers(text: str, numbers: tuple[float, ...]) -> None:
    assert parse_numbers("seed", text) == numbers


@pytest.mark.parametrize("text", ["", "a", "4-2", "1,,2", "-3-1", "1-x"])
def test_what_is_not_a_list_of_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="seed must list numbers"):
        parse_numbers("seed", text)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"learning_rate": (1e-4, 1e-4)}, "different values"),
        ({"seed": ()}, "different values"),
        ({"epochs": (1, 2)}, "a sweep may vary"),
        ({"seed": (0.5,)}, "whole number"),
        ({"learning_rate": (0.0,)}, "learning_rate must be above 0"),
    ],
)
def test_axes_that_cannot_be(axes: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trials(fpt_plus(), TrainConfig(), axes)
