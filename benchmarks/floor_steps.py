"""A training step and a frozen pass beside their floors, for ``benchmarks/floor_shares.py``."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from benchmarks import bench_side_attention, counts
from benchmarks.bench_frozen_pass import make_contest
from benchmarks.bench_training_step import BATCH, METHODS, PRECISIONS, steps_of
from benchmarks.cases import Sizes
from benchmarks.counts import Ceilings, Count, floor_seconds
from benchmarks.plain.epoch import write_features
from benchmarks.turns import Row, best_times, probes, share

LAYERS = {"fpt_plus": 6, "fpt": 12}
# Parts of a step by the operations that torch's profiler sees; what has no row here is the rest.
PARTS = {
    "linear maps": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "fpt_native::trained_linear",
        "fpt_native::trained_linear_backward",
    ),
    "prompt_attention": ("fpt_native::prompt_attention", "fpt_native::prompt_attention_backward"),
    "side_layers or side_attention": (
        "fpt_native::side_layers",
        "fpt_native::side_layers_backward",
        "fpt_native::side_attention",
        "fpt_native::side_attention_backward",
    ),
    "GELU and LayerNorm": (
        "aten::gelu",
        "aten::gelu_backward",
        "aten::native_layer_norm",
        "aten::native_layer_norm_backward",
    ),
    "optimiser": ("fpt_native::clipped_adam", "aten::_fused_adamw_", "aten::linalg_vector_norm"),
}


@register_flop_formula([torch.ops.fpt.trained_linear], get_raw=True)  # type: ignore[untyped-decorator]
def _trained_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, *_: Any, **__: Any
) -> int:
    return sum(2 * rows.numel() * weight.shape[0] for rows in (x, added) if rows is not None)


@register_flop_formula([torch.ops.fpt.trained_linear_backward], get_raw=True)  # type: ignore[untyped-decorator]
def _trained_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    added: Tensor | None,
    need_x: bool,
    *_: Any,
    **__: Any,
) -> int:
    of_added = _trained_linear(x, weight, None, added) - _trained_linear(x, weight, None, None)
    return (2 if need_x else 1) * _trained_linear(x, weight, None, None) + 2 * of_added


@register_flop_formula([torch.ops.fpt.side_layers], get_raw=True)  # type: ignore[untyped-decorator]
def _side_layers(
    tokens: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    queries: int,
    *_: Any,
    **__: Any,
) -> int:
    """Linear maps of the layers, which are within an op that torch cannot look into."""
    images, count, width = tokens.shape
    prompts, hidden = states.shape[2], len(weights[8])
    before, last = (
        counts.side_block_linear(images, count, prompts, seen, width, hidden)
        for seen in (count, queries)
    )
    return (len(states) - 1) * before + last


@register_flop_formula([torch.ops.fpt.side_layers_backward], get_raw=True)  # type: ignore[untyped-decorator]
def _side_layers_backward(
    grad: Tensor,
    tokens: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    *settings: Any,
    **_: Any,
) -> int:
    return 2 * _side_layers(tokens, states, weights, *settings)


def step_rows(full: bool, rounds: int) -> Iterator[Row]:
    """A training step by parts, its floor, and how many times plain the floor would be."""
    for method, precision in product(METHODS, PRECISIONS):
        torch.manual_seed(0)
        ours, plain, feature_bytes = steps_of(method, full, precision=precision)
        with FlopCounterMode(display=False) as counter:
            ours()
        linear = Count(counter.get_total_flops(), 0)
        measured, ceilings = probes(full)
        with tempfile.TemporaryDirectory() as folder:
            work = {"ours": ours, "plain": plain, "read": plain_reading(method, full, Path(folder))}
            best = best_times({**work, **measured}, rounds)
        limits = ceilings(best)
        attention = attention_floor(method, full, limits)
        floor = floor_seconds(linear, limits, precision) + attention
        yield {
            "method": method,
            "precision": precision,
            "seconds": best["ours"],
            "plain_seconds": best["plain"],
            "plain_reading_seconds": best["read"],
            "ratio": (best["plain"] + best["read"]) / best["ours"],
            "parts": parts_of(ours, rounds),
            "linear_floor_seconds": floor_seconds(linear, limits, precision),
            "attention_floor_seconds": attention,
            "floor_seconds": floor,
            "share": floor / best["ours"],
            "ratio_at_floor": (best["plain"] + best["read"]) / floor,
            "feature_bytes": feature_bytes,
        }


def attention_floor(method: str, full: bool, ceilings: Ceilings) -> float:
    """Of both attentions of a step; exponentials are not counted."""
    sizes = Sizes("full" if full else "tiny")
    layers = LAYERS[method]
    case = replace(sizes.prompt[0], layers=layers)
    count = counts.prompt_attention(case, torch.float32, torch.float16, True, True)
    side = bench_side_attention.contest(method, sizes).count
    # The last layer has one query, so next to nothing.
    return floor_seconds(count, ceilings, "float32") + (layers - 1) * floor_seconds(
        side, ceilings, "float32"
    )


def plain_reading(method: str, full: bool, folder: Path) -> Callable[[], Tensor]:
    """What reads a batch as the published code does: a file an image, collated and turned."""
    sizes = Sizes("full" if full else "tiny")
    case = sizes.prompt[0]
    layers = LAYERS[method]
    kv = torch.randn(layers, 2, case.heads, case.kept, case.width)
    files = [folder / f"{i}.safetensors" for i in range(BATCH)]
    for file in files:
        write_features(file, kv)

    def read() -> Tensor:
        parts = [load_file(file) for file in files]
        keys, _ = (
            torch.stack([part[name] for part in parts]).transpose(0, 1)
            for name in ("key_states", "value_states")
        )
        return keys

    return read


def parts_of(step: Callable[[], object], rounds: int) -> dict[str, float]:
    """Share of a step's time that each of ``PARTS`` takes, and the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            step()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    whole = sum(times.values())
    shares = {part: sum(times.get(op, 0) for op in ops) / whole for part, ops in PARTS.items()}
    return {**shares, "the rest": 1 - sum(shares.values())}


def frozen_row(full: bool, rounds: int) -> Row:
    """Preloading one image: operations over the bf16 matrix rate, and the plain pass beside it."""
    contest = make_contest(full)
    measured, ceilings = probes(full)
    best = best_times(
        {
            "ours": contest.run_ours,
            "plain": contest.run_plain,
            "timm": contest.run_timm,
            **measured,
        },
        rounds,
    )
    dtype = str(contest.backbone.dtype).removeprefix("torch.")
    return {
        "dtype": dtype,
        **share(Count(int(contest.flop), 0), ceilings(best), best["ours"], dtype),
        "plain_over_ours": best["plain"] / best["ours"],
        "timm_seconds": best["timm"],
        "plain_over_floor": best["plain"]
        / floor_seconds(Count(int(contest.flop), 0), ceilings(best), dtype),
    }
