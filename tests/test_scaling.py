"""Scaling curves: measured in both forms, kept between runs, drawn from the file."""

import json
from pathlib import Path

import pytest

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.curves import CURVES, Curve, Point
from benchmarks.scaling.page import plot


def points(curve: str, x: float) -> list[Point]:
    died = Point(curve, x, "plain", died="two maps are 13.0 GB, 4.0 GB are free")
    plain = Point(curve, x, "plain", 0.4, 8_000_000) if x < 100 else died
    return [Point(curve, x, "ours", 0.1, 2_000_000), plain]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Curves whose measurement takes no time, and the names of those that were measured."""
    measured: list[str] = []

    def of(name: str) -> Curve:
        def measure(x: float, small: bool) -> list[Point]:
            """How it is measured."""
            measured.append(name)
            return points(name, x)

        return Curve(name, f"Title of {name}", "size", "MB", ((10, 100), (10,)), measure)  # type: ignore[arg-type]

    for name in CURVES:
        monkeypatch.setitem(CURVES, name, of(name))
    return measured


def test_measured_kept_and_drawn(tmp_path: Path, made_up: list[str]) -> None:
    words = ["--results", str(tmp_path / "r" / "s.json"), "--docs", str(tmp_path / "docs")]
    scaling.main(words)
    assert set(made_up) == set(CURVES)
    page = (tmp_path / "docs" / "scaling.md").read_text()
    assert "| 10 | 0.1 s | 0.4 s | 4.00 | 2 | 8 |" in page
    assert "| 100 | 0.1 s | not run: two maps are 13.0 GB, 4.0 GB are free | – | 2 | – |" in page
    assert len(list((tmp_path / "docs" / "figures").glob("scaling-*.svg"))) == len(CURVES)
    made_up.clear()
    scaling.main([*words, "--only", "batch"])
    assert set(made_up) == {"batch"}
    kept = json.loads((tmp_path / "r" / "s.json").read_text())["points"]
    assert {point["curve"] for point in kept} == set(CURVES)
    assert len(kept) == 4 * len(CURVES)
    made_up.clear()
    scaling.main([*words, "--plot"])
    assert not made_up and (tmp_path / "docs" / "scaling.md").read_text() == page


def test_what_does_not_fit_into_the_time_is_left_out(
    tmp_path: Path, made_up: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.json"
    scaling.main(["--results", str(path), "--docs", str(tmp_path / "docs"), "--minutes", "0"])
    assert not made_up and json.loads(path.read_text())["points"] == []
    assert "batch of 100 is left out: 0 minutes are over" in capsys.readouterr().out


def test_drawing_needs_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--plot", "--results", str(tmp_path / "none.json")])
    assert "measure first" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "size"), [("ratio", 0.2), ("batch", 4), ("models", 2)])
def test_a_point_has_both_forms(name: str, size: float) -> None:
    measured = list(CURVES[name].measure(size, True))
    assert [point.who for point in measured] == ["ours", "plain"]
    assert all(point.x == size and point.seconds and point.bytes for point in measured)
    assert plot(CURVES[name], measured).startswith(b"<?xml")


def test_the_plain_pass_is_not_run_where_it_would_die(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def added(*words: str) -> dict[str, float]:
        asked.append(words)
        return {"seconds": 1.0, "added": 5, "tokens": 16385}

    monkeypatch.setattr("benchmarks.scaling.curves.added_bytes", added)
    monkeypatch.setattr(
        "benchmarks.scaling.curves.psutil.virtual_memory",
        lambda: type("Memory", (), {"available": 24 * 10**9})(),
    )
    ours, plain = CURVES["resolution"].measure(2048, False)
    assert len(asked) == 1 and ours.seconds == 1.0
    assert plain.seconds is None and "25.8 GB, 24.0 GB are free" in str(plain.died)


def test_an_epoch_has_both_forms() -> None:
    ours, plain = CURVES["images"].measure(20, True)
    assert ours.bytes and plain.bytes and plain.bytes > 1.5 * ours.bytes
    assert ours.seconds and plain.seconds


def test_the_page_is_drawn_from_what_was_measured(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    results = root / "benchmarks" / "results" / "scaling.json"
    scaling.main(["--plot", "--results", str(results), "--docs", str(tmp_path)])
    page = (tmp_path / "scaling.md").read_text()
    assert (root / "docs" / "scaling.md").read_text() == page
    assert "| 1024 | " in page and "e+" not in page
