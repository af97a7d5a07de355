"""The frozen pass of ViT-B at 512 px and the training step, beside timm and the plain models."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_frozen_pass import Contest, make_contest
from benchmarks.bench_training_step import METHODS, steps_of
from benchmarks.device.phases import Options
from benchmarks.device.schedule import Item
from benchmarks.device.timing import forget, peak_added, timed
from fpt_fast.ops.implementation import implementations, unsupported_reasons

IMAGES = 32
# The plain pass stores the map of every layer and computes in f32.
_PLAIN_IMAGES = 8


def items(options: Options) -> list[Item]:
    """The frozen pass by attention, a forward of timm, the plain pass, the training steps."""
    passes = [
        Item(f"frozen pass attention={name}", lambda _, n=name: frozen_pass(options, n), least=3.0)  # type: ignore[misc]
        for name in ("auto", *implementations("frozen_attention"))
        if name not in ("cpu", "blocked", "reference")
    ]
    others = [
        Item("frozen pass by timm, forward alone", lambda _: of_timm(options), least=3.0),
        Item("frozen pass, plain f32", lambda _: plain_pass(options), least=3.0),
    ]
    steps = [
        Item(f"training step {method}", lambda _, m=method: training_step(options, m), least=3.0)  # type: ignore[misc]
        for method in METHODS
    ]
    return [passes[0], *steps, *others, *passes[1:]]


def frozen_pass(options: Options, attention: str) -> dict[str, Any]:
    """Ours: scores and selection included, pixels on the device."""
    q = torch.zeros((1, 1, 2, 64), dtype=torch.bfloat16, device=options.device)
    if attention != "auto" and (why := unsupported_reasons("frozen_attention", attention, q, q, q)):
        return {"seconds": None, "why": why}
    contest = _contest(options, IMAGES, attention)
    row = _row(options, contest.run_ours, IMAGES if not options.is_dry else 1)
    row["tflop_per_s"] = contest.flop * row["images_per_s"] / 1e12
    return row


def of_timm(options: Options) -> dict[str, Any]:
    """Without scores, without selection."""
    row = _row(options, _contest(options, IMAGES).run_timm, IMAGES if not options.is_dry else 1)
    row["timm_images_per_s"] = row.pop("images_per_s")
    return row


def plain_pass(options: Options) -> dict[str, Any]:
    """The published algorithm."""
    contest = _contest(options, _PLAIN_IMAGES)
    row = _row(options, contest.run_plain, _PLAIN_IMAGES if not options.is_dry else 1)
    row["plain_images_per_s"] = row.pop("images_per_s")
    return row


def training_step(options: Options, method: str) -> dict[str, Any]:
    """Batch 16, features resident; the two losses agree over three steps."""
    torch.manual_seed(0)
    device = options.device
    ours, plain, feature_bytes = steps_of(method, not options.is_dry, str(device))
    for _ in range(3):
        torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-4)
    row = {**_eager(ours, device), "peak_added": peak_added(ours, device)}
    theirs = _eager(plain, device)["seconds"]
    row |= {"plain_seconds": theirs, "plain_over_ours": theirs / row["seconds"]}
    row |= {"plain_peak_added": peak_added(plain, device), "feature_bytes": feature_bytes}
    forget()
    return row


def _contest(options: Options, images: int, attention: str = "auto") -> Contest:
    if options.is_dry:
        return make_contest(False, attention=attention)
    return make_contest(True, "cuda", "bfloat16", images, attention)


def _row(options: Options, run: Callable[[], object], images: int) -> dict[str, Any]:
    took = _eager(run, options.device)
    peak = peak_added(run, options.device)
    forget()
    return {**took, "images": images, "images_per_s": images / took["seconds"], "peak_added": peak}


def _eager(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """As a caller pays it, launches included: an optimiser's step is not captured as it is."""
    return timed(run, device, graph=False)
