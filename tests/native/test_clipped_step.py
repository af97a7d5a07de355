"""The end of a training step in one call, beside torch's own clipping and optimisers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpt_fast.ops import native_optimizer
from fpt_fast.ops.native_reasons import native_levels, native_missing
from fpt_fast.trainer import optimizer as trainer_optimizer
from fpt_fast.trainer.arithmetic import Arithmetic
from fpt_fast.trainer.checkpoint import optimizer_tensors, restore_optimizer
from fpt_fast.trainer.optimizer import ClippedStep
from helpers import assert_tensors_equal, assert_within_budget

LEVELS = [] if native_missing() else native_levels().split(", ")
# Less than a vector, odd, several chains of vectors, more than a piece of 8192, nothing, a number.
SHAPES: Sequence[tuple[int, ...]] = ((3,), (33, 5), (129,), (4, 5000), (0, 7), ())
SETTINGS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}
Kind = type[torch.optim.Adam] | type[torch.optim.AdamW]


@pytest.fixture
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FPT_NATIVE_LEVEL", request.param)
    return str(request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of parameters of each call of ``clipped_adam``."""
    seen: list[int] = []
    own = native_optimizer.clipped_adam

    def spy(parameters: Sequence[Tensor], *args: Any, **settings: Any) -> Tensor:
        seen.append(len(parameters))
        return own(parameters, *args, **settings)

    monkeypatch.setattr(trainer_optimizer, "clipped_adam", spy)
    return seen


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES)
    return [nn.Parameter(value.float().to(dtype)) for value in made]


def gradients_of(steps: int, scale: float = 1.0) -> Iterator[list[Tensor]]:
    """f32 gradients of each step, of sizes a thousandfold apart."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield [
            scale * 10.0 ** -(i % 4) * torch.randn(shape, generator=generator)
            for i, shape in enumerate(SHAPES)
        ]


def by_torch(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip_norm: float
) -> None:
    nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()


def train(
    kind: Kind,
    step: Callable[..., None],
    steps: Iterator[list[Tensor]],
    dtype: torch.dtype = torch.float32,
    clip_norm: float = 1.0,
    **changes: Any,
) -> list[Tensor]:
    """Parameters and the optimiser's state after ``steps``, in a fixed order."""
    parameters = make_parameters(dtype)
    optimizer = kind(parameters, **{**SETTINGS, "fused": dtype == torch.float32, **changes})
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(dtype)
        step(optimizer, parameters, clip_norm)
    state = optimizer_tensors(optimizer)
    return [*(parameter.detach() for parameter in parameters), *(state[n] for n in sorted(state))]


def values_of(results: list[Tensor], kind: int) -> Tensor:
    """All parameters, moments of one kind or steps: of one number an error says little."""
    count = len(SHAPES)
    picked = results[:count] if kind == 0 else results[count + kind - 1 :: 3]
    return torch.cat([value.reshape(-1) for value in picked])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_budget(level: str, kind: Kind, scale: float, calls: list[int]) -> None:
    """Clipped by much and not at all; the oracle is torch's own in f64."""
    ours = train(kind, ClippedStep(), gradients_of(5, scale))
    assert calls == [len(SHAPES)] * 5
    plain = train(kind, by_torch, gradients_of(5, scale))
    exact = train(kind, by_torch, gradients_of(5, scale), torch.float64)
    for kind_of_value in range(4):
        out, oracle, eager = (values_of(results, kind_of_value) for results in (ours, exact, plain))
        assert_within_budget(out, oracle.double(), eager)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_norm_is_of_all_gradients(level: str) -> None:
    (gradients,) = gradients_of(1)
    parameters, count = make_parameters(), sum(gradient.numel() for gradient in gradients)
    moments = torch.zeros(count), torch.zeros(count)
    settings: dict[str, Any] = {"rate": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.0}
    before = [gradient.clone() for gradient in gradients]
    norm = native_optimizer.clipped_adam(
        parameters,
        gradients,
        moments,
        torch.zeros(len(SHAPES)),
        **settings,
        decoupled=True,
        clip_norm=1.0,
    )
    exact = nn.utils.get_total_norm([gradient.double() for gradient in gradients])
    assert_within_budget(norm, exact, nn.utils.get_total_norm(gradients))
    assert_tensors_equal(gradients, before)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_below_the_limit_clipping_is_nothing(level: str) -> None:
    within, unlimited = (
        train(torch.optim.AdamW, ClippedStep(), gradients_of(3, 1e-3), clip_norm=limit)
        for limit in (1.0, float("inf"))
    )
    assert_tensors_equal(within, unlimited)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_gradients_of_zero_move_nothing(level: str) -> None:
    zeros = ([torch.zeros(shape) for shape in SHAPES] for _ in range(2))
    results = train(torch.optim.AdamW, ClippedStep(), zeros, weight_decay=0.0)
    assert_tensors_equal(results[: len(SHAPES)], [p.detach() for p in make_parameters()])
    for name, value in zip(("exp_avg", "exp_avg_sq", "step"), results[len(SHAPES) :], strict=False):
        assert torch.equal(value, torch.full_like(value, 2.0 * (name == "step")))


@pytest.mark.parametrize("clip_norm", [1.0, float("inf")])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e20])
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_norms_that_are_not_finite_do_what_they_do_in_torch(
    level: str, bad: float, clip_norm: float
) -> None:
    """A square that leaves f32 makes the norm infinite, too."""
    (gradients,) = gradients_of(1)
    gradients[1][7, 2] = bad
    results = [
        train(torch.optim.AdamW, step, iter([gradients]), clip_norm=clip_norm)
        for step in (ClippedStep(), by_torch)
    ]
    for out, expected in zip(*results, strict=True):
        torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_threads_do_not_change_a_bit(level: str) -> None:
    threads, results = torch.get_num_threads(), []
    values = [torch.randn(70_000), torch.randn(3), torch.randn(200, 700)]
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            parameters = [nn.Parameter(value.clone()) for value in values]
            optimizer, step = torch.optim.AdamW(parameters, fused=True), ClippedStep()
            for _ in range(2):
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.grad = value.sin()
                step(optimizer, parameters, 1.0)
            results.append([*map(torch.Tensor.detach, parameters)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_tensors_equal(result, results[0])


def test_state_is_that_of_torch_and_is_taken_up(calls: list[int]) -> None:
    """A run that is resumed goes on bit for bit; one of torch's own optimiser goes on, too."""
    parameters, step = make_parameters(), ClippedStep()
    optimizer = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
    twins = make_parameters()
    fresh = torch.optim.AdamW(twins, **SETTINGS, fused=True)
    for number, gradients in enumerate(gradients_of(5)):
        if number == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            tensors = optimizer_tensors(optimizer)
            for own, twin in zip(parameters, twins, strict=True):
                twin.data.copy_(own.data)
            restore_optimizer(fresh, tensors)
            other = torch.optim.AdamW(make_parameters(), **SETTINGS, fused=True)
            other.load_state_dict(saved)
        for own, twin, gradient in zip(parameters, twins, gradients, strict=True):
            own.grad, twin.grad = gradient, gradient.clone()
        step(optimizer, parameters, 1.0)
        # The same object for all: it notices that it is given another state.
        (step if number < 3 else ClippedStep())(fresh, twins, 1.0)
    assert len(calls) == (10 if LEVELS else 0)
    plain = torch.optim.AdamW(make_parameters(), **SETTINGS, fused=True)
    for parameter in plain.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    for number, values in plain.state_dict()["state"].items():
        own_values = optimizer.state_dict()["state"][number]
        assert {n: (v.shape, v.dtype) for n, v in values.items()} == {
            n: (v.shape, v.dtype) for n, v in own_values.items()
        }


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_resumed_bit_for_bit(level: str) -> None:
    whole = train(torch.optim.AdamW, ClippedStep(), gradients_of(5))
    parameters, step = make_parameters(), ClippedStep()
    optimizer = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
    for number, gradients in enumerate(gradients_of(5)):
        if number in (2, 4):  # into the same optimiser, then into a new one
            tensors = optimizer_tensors(optimizer)
            if number == 4:
                optimizer = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
            restore_optimizer(optimizer, tensors)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        step(optimizer, parameters, 1.0)
    state = optimizer_tensors(optimizer)
    assert_tensors_equal(
        [*(p.detach() for p in parameters), *(state[n] for n in sorted(state))], whole
    )


def leave_one_out(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[1].grad = None


def hook_before(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.register_step_pre_hook(lambda *_: None)


def hook_after(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.register_step_post_hook(lambda *_: None)


def attach_scheduler(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)


def rate_as_tensor(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02)


def second_group(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    parameters.append(other)
    optimizer.add_param_group({"params": [other], "lr": 0.1})


def clip_fewer(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters.pop()


def columns_first(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    grad = parameters[1].grad
    assert grad is not None
    parameters[1].data = parameters[1].data.t().contiguous().t()
    parameters[1].grad = grad.t().contiguous().t()


def as_f64(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        assert parameter.grad is not None
        grad, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.double()
        parameter.grad = grad.double()


CHANGES: list[Callable[[torch.optim.Optimizer, list[nn.Parameter]], None]] = [
    leave_one_out,
    hook_before,
    hook_after,
    attach_scheduler,
    rate_as_tensor,
    second_group,
    clip_fewer,
    columns_first,
    as_f64,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_otherwise_goes_through_torch(
    change: Callable[[torch.optim.Optimizer, list[nn.Parameter]], None], calls: list[int]
) -> None:
    assert_steps_as_torch(torch.optim.AdamW, change, calls)


@pytest.mark.parametrize("settings", [{"amsgrad": True}, {"maximize": True}], ids=str)
def test_other_kinds_of_adam_go_through_torch(settings: dict[str, Any], calls: list[int]) -> None:
    assert_steps_as_torch(torch.optim.AdamW, lambda *_: None, calls, **settings)


def test_a_subclass_goes_through_torch(calls: list[int]) -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert_steps_as_torch(Mine, lambda *_: None, calls)


def test_without_the_extension_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    monkeypatch.setattr(trainer_optimizer, "has_clipped_adam", lambda: False)
    assert_steps_as_torch(torch.optim.AdamW, lambda *_: None, calls)


def assert_steps_as_torch(
    kind: Kind,
    change: Callable[[torch.optim.Optimizer, list[nn.Parameter]], None],
    calls: list[int],
    **settings: Any,
) -> None:
    """Bit for bit, and without ``clipped_adam``."""
    results = []
    for step in (ClippedStep(), by_torch):
        parameters = make_parameters()
        optimizer = kind(parameters, **SETTINGS, fused=True, **settings)
        (gradients,) = gradients_of(1)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        change(optimizer, parameters)
        step(optimizer, parameters, 1.0)
        results.append([parameter.detach() for parameter in parameters])
    assert_tensors_equal(*results)
    assert calls == []


def test_a_step_of_torch_between_two_of_ours(calls: list[int]) -> None:
    """The state that both keep is one."""
    results = []
    for step in (ClippedStep(), by_torch):
        parameters = make_parameters()
        optimizer = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
        for number, gradients in enumerate(gradients_of(3)):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            if number == 1:
                parameters[1].grad = None
            step(optimizer, parameters, 1.0)
        state = optimizer_tensors(optimizer)
        assert [float(state[f"{i}.step"]) for i in (0, 1)] == [3, 2]
        results.append([parameter.detach() for parameter in parameters])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == (2 if LEVELS else 0)


@pytest.mark.parametrize(("precision", "count"), [("float32", 1), ("bfloat16", 1), ("float16", 0)])
def test_what_a_training_step_ends_with(precision: Any, count: int, calls: list[int]) -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
    arithmetic = Arithmetic(precision, torch.device("cpu"))
    arithmetic.backward(torch.stack([p.square().sum() for p in parameters]).sum())
    arithmetic.step(optimizer, parameters, 1.0)
    assert len(calls) == (count if LEVELS else 0)


@pytest.mark.parametrize("level", LEVELS[:1], indirect=True)
def test_what_would_leave_a_tensor_is_refused(level: str) -> None:
    good: dict[str, Any] = {
        "parameters": [torch.zeros(2, 3), torch.zeros(4)],
        "gradients": [torch.zeros(2, 3), torch.zeros(4)],
        "moments": (torch.zeros(10), torch.zeros(10)),
        "steps": torch.zeros(2),
    }
    settings: dict[str, Any] = {"rate": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.0}
    settings |= {"decoupled": True, "clip_norm": 1.0}
    assert float(native_optimizer.clipped_adam(**good, **settings)) == 0
    for change, message in (
        (
            {"gradients": [torch.zeros(2, 3)]},
            "gradients must hold 2 tensors like parameters, got 1",
        ),
        ({"gradients": [torch.zeros(2, 3), torch.zeros(5)]}, r"gradients must be \(4\)"),
        ({"gradients": [torch.zeros(3, 2).t(), torch.zeros(4)]}, "contiguous"),
        ({"parameters": [torch.zeros(2, 3).double(), torch.zeros(4)]}, "parameters must be .*f"),
        ({"moments": (torch.zeros(9), torch.zeros(10))}, r"means must be \(10\)"),
        ({"moments": (torch.zeros(10), torch.zeros(11))}, r"squares must be \(10\)"),
        ({"steps": torch.zeros(3)}, r"steps must be \(2\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native_optimizer.clipped_adam(**{**good, **change}, **settings)
