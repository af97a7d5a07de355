"""Which tier is chosen, over all sizes that matter: the fastest that fits, and why not another."""

import itertools
from typing import Any

import pytest

from fpt_fast.config import ConfigError
from fpt_fast.tiers import Sizes, SplitSize, choose_tiers

GB = 10**9
TRAIN = SplitSize("train", 1000, repeated=True)
VAL = SplitSize("val", 100, repeated=True)
TEST = SplitSize("test", 100, repeated=False)


def sizes(**changes: Any) -> Sizes:
    """Records of 10 MB: 10 GB of training images, 1 GB of validation images."""
    values = {
        "record": GB // 100,
        "side": 0,
        "batch_size": 10,
        "workers": 2,
        "device": "cuda",
        "device_free": 80 * GB,
        "host_free": 128 * GB,
    }
    return Sizes(**{**values, **changes})


def tiers(wanted: Any, of: Sizes, splits: Any = (TRAIN, VAL, TEST)) -> list[str]:
    return [placement.tier for placement in choose_tiers(wanted, splits, of)]


def test_margins_are_kept() -> None:
    of = sizes(side=GB // 100)
    assert of.staging == 2 * 10 * 2 * GB // 100
    assert of.device_room == 72 * GB - GB - of.staging
    assert of.reading == (2 + 2 + 2) * 10 * GB // 100
    assert of.host_room == 64 * GB - of.reading
    assert sizes(processes=8).host_room == 8 * GB - of.reading


# Stores of 10 and 1 GB, beside 1 GB of reserve and 0.2 GB of staging, in nine tenths of the free.
@pytest.mark.parametrize(
    ("device_free", "host_free", "expected"),
    [
        (80, 128, ["resident", "resident", "disk"]),
        (13.4, 128, ["resident", "pinned", "disk"]),
        (13.4, 1, ["resident", "disk", "disk"]),
        (12, 128, ["pinned", "resident", "disk"]),
        (3, 22.0, ["pinned", "resident", "disk"]),
        (1, 24, ["pinned", "pinned", "disk"]),
        (1, 22.0, ["pinned", "disk", "disk"]),
        (1, 21.0, ["disk", "pinned", "disk"]),
        (1, 2, ["disk", "disk", "disk"]),
        (0, 0, ["disk", "disk", "disk"]),
    ],
)
def test_auto_takes_the_fastest_that_fits(
    device_free: float, host_free: float, expected: list[str]
) -> None:
    of = sizes(device_free=int(device_free * GB), host_free=int(host_free * GB))
    assert tiers("auto", of) == expected


@pytest.mark.parametrize("room", ["device_free", "host_free"])
def test_one_byte_decides(room: str) -> None:
    """The largest store that fits does, and one byte more does not."""
    free = {"device_free": 0, "host_free": 0, room: 40 * GB}
    of = sizes(record=1, batch_size=1, **free)
    limit = of.device_room if room == "device_free" else of.host_room
    fitting = "resident" if room == "device_free" else "pinned"
    assert tiers("auto", of, [SplitSize("train", limit, True)]) == [fitting]
    assert tiers("auto", of, [SplitSize("train", limit + 1, True)]) == ["disk"]


def test_no_choice_takes_more_than_there_is() -> None:
    for device, host, first, second in itertools.product(range(0, 40, 3), repeat=4):
        of = sizes(device_free=device * GB, host_free=host * GB)
        splits = [SplitSize("train", first * 50, True), SplitSize("val", second * 50, True)]
        placed = choose_tiers("auto", splits, of)
        on_device = sum(placement.device_bytes for placement in placed)
        on_host = sum(placement.host_bytes for placement in placed)
        assert on_device <= max(0, of.device_room) and on_host <= max(0, of.host_room)
        for split, placement in zip(splits, placed, strict=True):
            used = placement.device_bytes + placement.host_bytes
            assert used == (0 if placement.tier == "disk" else split.images * of.record)


@pytest.mark.parametrize("wanted", ["resident", "pinned", "disk"])
def test_what_is_wanted_is_taken_where_it_fits(wanted: str) -> None:
    assert tiers(wanted, sizes()) == [wanted, wanted, "disk"]


@pytest.mark.parametrize(
    ("wanted", "free", "told"),
    [
        (
            "resident",
            {"device_free": 10 * GB},
            r"take 10\.00 GB, and 7\.80 GB of GPU memory .* 2\.20 GB too little; use pinned, disk",
        ),
        ("resident", {"device_free": 13 * GB}, "take 1.00 GB, and 0.50 GB of GPU memory"),
        (
            "pinned",
            {"host_free": 10 * GB},
            r"take 10\.00 GB, and 4\.40 GB of host memory .* 5\.60 GB too little; use disk or auto",
        ),
    ],
)
def test_what_is_wanted_and_cannot_be_is_refused(
    wanted: Any, free: dict[str, int], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        choose_tiers(wanted, (TRAIN, VAL), sizes(**free))


def test_on_a_cpu() -> None:
    of = sizes(device="cpu", device_free=0, host_free=0)
    assert tiers("auto", of) == ["in place"] * 3 and tiers("disk", of) == ["disk"] * 3
    for wanted in ("resident", "pinned"):
        with pytest.raises(ConfigError, match=f"{wanted} is for a model on a GPU"):
            tiers(wanted, of)


def test_reasons_name_the_sizes() -> None:
    reasons = [p.reason for p in choose_tiers("auto", (TRAIN, TEST), sizes())]
    assert reasons == [
        "they take 10.00 GB, and 70.80 GB of GPU memory are to be had",
        "they are read once",
    ]
    [pinned] = choose_tiers("auto", (TRAIN,), sizes(device_free=0))
    assert pinned.reason == (
        "they are more than the 0.00 GB of GPU memory: they take 10.00 GB, and 63.40 GB of host "
        "memory may be pinned"
    )
    [disk] = choose_tiers("auto", (TRAIN,), sizes(device_free=0, host_free=0))
    assert "more than the 0.00 GB of GPU memory and the 0.00 GB of host memory" in disk.reason
