"""The bars that issues set, and whether a run met them; what failed, and what was not proven."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.counts import H200, Count, floor_seconds
from benchmarks.device.report import Report

SCORES, PROMPT = "token_scores, log-sum-exp given", "prompt_attention"
_SCRATCH = 16 << 20
_PROMPT_PAIRS = ("bfloat16 float16", "bfloat16 int8", "bfloat16 float8_e4m3fn")


@dataclass(frozen=True)
class Bar:
    """``value`` of a report (None: not measured) against ``limit``, which it must not pass.

    ``at_least`` tells on which side the limit lies.
    """

    name: str
    unit: str
    at_least: bool
    value: Callable[[Report], float | None]
    limit: Callable[[Report], float | None]

    def judge(self, report: Report) -> dict[str, Any]:
        """Name, value, limit, and whether it is met: None where it was not measured."""
        value, limit = self.value(report), self.limit(report)
        met = None
        if value is not None and limit is not None and not report.content["dry_run"]:
            met = value >= limit if self.at_least else value <= limit
        sign = "≥" if self.at_least else "≤"
        row = {"name": self.name, "unit": self.unit, "sign": sign}
        return {**row, "value": value, "limit": limit, "met": met}


def bars(report: Report) -> list[dict[str, Any]]:
    """Every bar of issues 3, 5, 8 and 9 that one run can judge."""
    return [bar.judge(report) for bar in _all()]


def _all() -> Iterator[Bar]:
    for case in ("vit_b_512px_x16", "vit_b_1024px_x16"):
        name = f"{SCORES} {case} bfloat16"
        yield Bar(f"{name}: time", "µs", False, _of(name, "seconds", 1e6), _twice_floor(name))
        yield Bar(f"{name}: memory", "bytes", False, _of(name, "peak_added"), _scratch(name))
    name = "select_tokens vit_b_512px_x16 bfloat16"
    yield Bar(f"{name}: rate", "GB/s", True, _of(name, "gb_per_s"), _copy(0.7))
    for group in (PROMPT, f"{PROMPT}, backward"):
        for pair in _PROMPT_PAIRS:
            name = f"{group} fpt_plus_vit_b_512px {pair}"
            yield Bar(f"{name}: rate", "GB/s", True, _of(name, "gb_per_s"), _copy(0.8))
    yield Bar("frozen pass, bf16", "images/s", True, _best_pass, lambda _: 2000.0)
    for method, most, memory in (("fpt_plus", 0.5, 200.0), ("fpt", 1.5, 500.0)):
        item = f"step {method} x16"
        yield Bar(f"{item} resident", "ms", False, _best_step(f"{item} resident", 1e3), _is(most))
        peak = _step(f"{item} disk graph", "peak", 1e-6)
        yield Bar(f"{item} disk: peak memory", "MB", False, peak, _is(memory))
    name = "step fpt_plus x16 resident: plain / ours"
    yield Bar(name, "×", True, _plain_over_step("fpt_plus"), _is(20.0))


def _of(item: str, key: str, factor: float = 1.0) -> Callable[[Report], float | None]:
    return lambda report: _number(dict(report.results("ops")).get(item), key, factor)


def _model(item: str, key: str, factor: float = 1.0) -> Callable[[Report], float | None]:
    return lambda report: _number(dict(report.results("models")).get(item), key, factor)


def _step(item: str, key: str, factor: float = 1.0) -> Callable[[Report], float | None]:
    return lambda report: _number(dict(report.results("steps")).get(item), key, factor)


def _is(limit: float) -> Callable[[Report], float | None]:
    return lambda report: limit


def _best_step(start: str, factor: float = 1.0) -> Callable[[Report], float | None]:
    """The fastest of the ways of launching, the one that a user would take."""

    def value(report: Report) -> float | None:
        rows = [row for name, row in report.results("steps") if name.startswith(f"{start} ")]
        return min((row["seconds"] * factor for row in rows), default=None)

    return value


def _plain_over_step(method: str) -> Callable[[Report], float | None]:
    """The plain step of the phase ``models`` over the fastest step with resident features."""

    def value(report: Report) -> float | None:
        ours = _best_step(f"step {method} x16 resident")(report)
        plain = _model(f"training step {method}", "plain_seconds")(report)
        return None if ours is None or plain is None else plain / ours

    return value


def _number(row: dict[str, Any] | None, key: str, factor: float = 1.0) -> float | None:
    value = None if row is None else row.get(key)
    return None if value is None else value * factor


def _twice_floor(item: str) -> Callable[[Report], float | None]:
    """In µs, by the ceilings of DESIGN.md: 51 µs at N = 1025, whatever device was at hand."""

    def limit(report: Report) -> float | None:
        row = dict(report.results("ops")).get(item)
        if row is None:
            return None
        count = Count(row["flops"], row["bytes"], row["exponentials"])
        return 2e6 * floor_seconds(count, H200, row["dtype"])

    return limit


def _scratch(item: str) -> Callable[[Report], float | None]:
    """The results and 16 MB."""

    def limit(report: Report) -> float | None:
        out = _number(dict(report.results("ops")).get(item), "out_bytes")
        return None if out is None else out + _SCRATCH

    return limit


def _copy(share: float) -> Callable[[Report], float | None]:
    """A share of the measured copy bandwidth, in GB/s."""

    def limit(report: Report) -> float | None:
        found = _number(dict(report.results("environment")).get("ceilings"), "bandwidth")
        return None if found is None else share * found / 1e9

    return limit


def _best_pass(report: Report) -> float | None:
    rates = [row["images_per_s"] for _, row in report.results("models") if "images_per_s" in row]
    return max(rates, default=None)


def failures(report: Report) -> list[str]:
    """What is wrong: tests, repeats that differ, memory errors, wrong results, dead processes."""
    found = []
    for phase, content in report.content["phases"].items():
        for name, item in content["items"].items():
            if item["state"] in ("failed", "killed"):
                found.append(f"{phase}: {name}: {item['state']}: {item['why'][:300]}")
            elif item["state"] == "done":
                found += [f"{phase}: {name}: {why}" for why in _complaints(phase, item["result"])]
    return found


def _complaints(phase: str, result: dict[str, Any]) -> Iterator[str]:
    if phase == "gpu_tests":
        yield from (f"{test['name']}: {test['message'][-200:]}" for test in result["failed"])
        if result["exit_status"] not in (0, 1, None):
            yield f"pytest ended with {result['exit_status']}: {result['tail'][-300:]}"
    elif phase == "races" and result["differing"]:
        yield f"{result['differing']} of {result['repeats']} repeats differ"
    elif phase == "sanitizer" and result.get("errors"):
        yield result["summary"]


def unproven(report: Report) -> list[str]:
    """Proofs that did not run, or not to their end."""
    found = []
    for phase in ("gpu_tests", "races", "sanitizer"):
        if phase not in report.content["wanted"]:
            continue
        items = report.items(phase)
        if not items:
            found.append(f"{phase}: not reached")
        found += [f"{phase}: {n}: not run" for n, i in items.items() if i["state"] == "not run"]
    for name, result in report.results("gpu_tests"):
        done = result["passed"] + len(result["failed"])
        if result["exit_status"] is None or done < result["collected"]:
            found.append(f"gpu_tests: {name}: {done} of {result['collected']} tests ran")
    return found
