"""The short form of the attack on the cache; ``make reliability`` is the long one.

See ``kills.py``, ``processes.py``, ``faults.py``, ``flips.py``, ``fuzz.py``, ``soak.py``, and
``power_loss.py`` for its model of a disk.
"""

import json

import pytest
from reliability.attack import PARTS, REPOSITORY, Part, run
from reliability.subjects import DTYPE_NAMES

from benchmarks import readme_reliability

# What a part must have counted at the very least: a count near 0 would test nothing.
LEAST = {
    "kills": {"kills": 8, "builds": 1},
    "steps": {"kills": 15, "places": 350},
    "processes": {"locks": 4, "refusals": 1, "rounds": 3, "looks": 10},
    "power": {"replays": 5000, "states": 700, "valid": 100, "unfinished": 400, "faults": 50},
    "faults": {"faults": 350, "errors": 250, "successes": 50},
    "flips": {"flips": 1500, "detected": 700, "mended": 150, "refused": 300},
    "soak": {"epochs": 20, "bytes read": 20 * 80 * 10**6, "cache bytes": 80 * 10**6},
    "fuzz": {"inputs": 4000, "plans": 800, "shards": 100, "journals": 300, "consistent": 500},
}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_attack(part: Part) -> None:
    counts = run(part.name, part.short)
    assert set(counts) == set(DTYPE_NAMES)
    for dtype in DTYPE_NAMES:
        for name, least in LEAST[part.name].items():
            assert counts[dtype][name] >= least, (dtype, name, counts)


def test_the_readme_says_what_was_counted() -> None:
    results = json.loads(readme_reliability.RESULTS.read_text(encoding="utf-8"))
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = text.partition(readme_reliability.START)[2].partition(readme_reliability.END)[0]
    assert block.strip() == readme_reliability.render(results)
