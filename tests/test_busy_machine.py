"""The measurement of steps on a busy machine, at tiny sizes, whose times say nothing."""

import json

import pytest

from benchmarks.busy_machine import (
    DOCUMENT,
    END,
    POLICIES,
    PRECISIONS,
    RESULTS,
    START,
    main,
    measure,
    render,
)


@pytest.mark.slow
def test_every_setting_is_measured_and_stands_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one busy process, of which tests have no use
    found = json.loads(json.dumps(measure(full=False, count=1, rounds=1)))
    assert len(found["rows"]) == 2 * len(POLICIES) * len(PRECISIONS)
    assert {row["others"] for row in found["rows"]} == {0, 1}
    assert min(row["seconds"] for row in found["rows"]) > 0
    table = render(found).splitlines()
    assert sum(line.startswith("| nothing |") for line in table) == len(PRECISIONS)
    assert len(table) == 4 + 2 * len(PRECISIONS)


def test_tiny_sizes_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tiny", "--write"])
    assert "leave out --tiny" in capsys.readouterr().err


def test_the_document_says_what_was_measured() -> None:
    block = DOCUMENT.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].strip()
    assert block == render(json.loads(RESULTS.read_text(encoding="utf-8")))
