"""Patients: on one side each, with the classes as near to their shares as patients allow."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from fpt_fast.images import ImageSetError, load_image_set
from fpt_fast.images.csv_list import Row
from fpt_fast.images.grouped_splits import divide_groups
from fpt_fast.images.patients import complete_splits, divide_rows
from fpt_fast.records import SPLITS

TABLES = 1000


def random_table(rng: np.random.Generator) -> list[Row]:
    """Patients with one image or many, of one class or several, classes rare or common."""
    classes = int(rng.integers(2, 6))
    weights = rng.dirichlet(np.full(classes, rng.uniform(0.3, 5)))
    mixed = rng.random() < 0.5
    rows: list[Row] = []
    for patient in range(int(rng.integers(3, 60))):
        count = 1 + int(rng.geometric(rng.uniform(0.1, 0.9)))
        labels = rng.choice(classes, count if mixed else 1, p=weights)
        for number in range(count):
            label = str(labels[number % len(labels)])
            rows.append(Row(f"{patient}/{number}.png", label, None, f"p{patient}"))
    return rows


def counted(rows: list[Row]) -> tuple[list[str], dict[str, np.ndarray]]:
    kinds = sorted({row.label for row in rows})
    contents: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(kinds)))
    for row in rows:
        contents[str(row.patient)][kinds.index(row.label)] += 1
    return kinds, contents


def distance(
    part_of: dict[str, int], contents: dict[str, np.ndarray], shares: tuple[float, ...]
) -> float:
    """Squared distance from the shares, of every class and of all images, in units of a class."""
    whole = sum(contents.values())
    total = 0.0
    for part, share in enumerate(shares):
        inside = sum((c for g, c in contents.items() if part_of[g] == part), 0 * whole)
        total += float((((inside - share * whole) ** 2) / whole).sum())
        total += float((inside.sum() - share * whole.sum()) ** 2 / whole.sum())
    return total


def test_a_thousand_tables_tear_no_patient_apart_and_keep_the_class_shares() -> None:
    rng = np.random.default_rng(0)
    for table in range(TABLES):
        rows = random_table(rng)
        shares = [(0.7, 0.1, 0.2), (0.6, 0.2, 0.2), (0.8, 0.2, 0.0)][table % 3]
        splits = divide_rows(rows, shares, seed=table)
        assert set(splits) == {row.key for row in rows}
        sides: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            sides[str(row.patient)].add(splits[row.key])
        assert all(len(found) == 1 for found in sides.values())
        part_of = {name: SPLITS.index(next(iter(found))) for name, found in sides.items()}  # type: ignore[arg-type]
        kinds, contents = counted(rows)
        groups = [list(part_of.values()).count(part) for part in range(3)]
        assert {row.label for row in rows if splits[row.key] == "train"} == set(kinds)
        filled = [(groups[part] > 0) == (shares[part] > 0) for part in range(3)]
        # Only where train cannot do without any of its patients may val or test stay empty.
        assert all(filled) or needs_all(part_of, contents)
        if table % 10 == 0:
            assert_no_move_helps(part_of, contents, shares, groups)


def needs_all(part_of: dict[str, int], contents: dict[str, np.ndarray]) -> bool:
    """Whether each patient of train is the only one there of some class."""
    train = [name for name, part in part_of.items() if part == 0]
    held = sum(contents[name] > 0 for name in train)
    return all(bool(((contents[name] > 0) & (held == 1)).any()) for name in train)


def assert_no_move_helps(
    part_of: dict[str, int],
    contents: dict[str, np.ndarray],
    shares: tuple[float, ...],
    groups: list[int],
) -> None:
    """ "What group sizes allow": no patient could move and bring the class shares nearer."""
    now = distance(part_of, contents, shares)
    in_train = sum(c for g, c in contents.items() if part_of[g] == 0)
    for name, part in part_of.items():
        needed = groups[part] == 1 or (part == 0 and bool((in_train - contents[name] == 0).any()))
        for other in (p for p in range(3) if shares[p] > 0 and p != part and not needed):
            assert distance({**part_of, name: other}, contents, shares) >= now - 1e-6


@pytest.mark.parametrize("parts", [3, 5, 10])
def test_patients_of_one_class_deviate_by_less_than_the_largest(parts: int) -> None:
    rng = np.random.default_rng(parts)
    for seed in range(20):
        contents = {
            f"p{number}": np.eye(3)[number % 3] * rng.integers(1, 9) for number in range(90)
        }
        found = divide_groups(contents, (1 / parts,) * parts, seed)
        largest = np.max(list(contents.values()), axis=0)
        whole = sum(contents.values())
        for part in range(parts):
            inside = sum(c for g, c in contents.items() if found[g] == part)
            # By class, and with the pull of the number of all images, at most twice as much.
            assert (np.abs(inside - whole / parts) <= 2 * largest).all()


def test_single_images_are_divided_as_nearly_as_can_be() -> None:
    contents = {f"{number}": np.eye(4)[number % 4] for number in range(400)}
    found = divide_groups(contents, (0.2,) * 5, seed=1)
    for part in range(5):
        inside = sum(c for g, c in contents.items() if found[g] == part)
        assert (np.abs(inside - 20) <= 1).all() and abs(inside.sum() - 80) <= 2


def test_the_order_does_not_matter_and_the_seed_does() -> None:
    rows = random_table(np.random.default_rng(5))
    first = divide_rows(rows, (0.7, 0.1, 0.2), 3)
    assert divide_rows(rows[::-1], (0.7, 0.1, 0.2), 3) == first
    assert len({tuple(divide_rows(rows, (0.7, 0.1, 0.2), s).values()) for s in range(8)}) > 4


def test_many_patients_take_no_long_time() -> None:
    rng = np.random.default_rng(0)
    contents = {f"{i}": rng.integers(0, 4, 14).astype(float) for i in range(20_000)}
    found = divide_groups(contents, (0.7, 0.1, 0.2), 0, complete=0)
    inside = sum(c for g, c in contents.items() if found[g] == 0)
    assert inside / sum(contents.values()) == pytest.approx([0.7] * 14, abs=1e-3)


def listed(folder: Path, lines: list[str]) -> Path:
    for line in lines[1:]:
        path = folder / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def test_patients_of_a_list(tmp_path: Path) -> None:
    lines = ["path,who,label"]
    lines += [f"{p}/{i}.png,patient {p},{p % 2}" for p in range(20) for i in range(1 + p % 3)]
    images = load_image_set(listed(tmp_path, lines), patient_column="who")
    sides: dict[str | None, set[str]] = defaultdict(set)
    for item in images.items:
        sides[item.patient].add(item.split)
        assert item.patient == f"patient {item.key.partition('/')[0]}"
    assert all(len(found) == 1 for found in sides.values()) and len(sides) == 20
    assert all(images.of_split(split) for split in SPLITS)


def test_val_is_taken_from_train_by_patient(tmp_path: Path) -> None:
    rows = [
        Row(f"{p}/{i}.png", str(p % 2), "test" if p > 15 else "train", f"p{p}")
        for p in range(20)
        for i in range(4)
    ]
    splits = complete_splits(rows, (0.7, 0.1, 0.2), seed=0)
    for p in range(20):
        assert len({splits[f"{p}/{i}.png"] for i in range(4)}) == 1
    assert sorted({splits[row.key] for row in rows}) == ["test", "train", "val"]


def test_patients_of_folders(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for name in ("P1_left", "P1_right", "P2_left", "P3_left", "P4_x", "P5_x", "P6_x"):
            (tmp_path / label / f"{name}.png").touch()
    images = load_image_set(tmp_path, patient_pattern=r"(P\d+)_")
    sides: dict[str | None, set[str]] = defaultdict(set)
    for item in images.items:
        sides[item.patient].add(item.split)
    # A patient of two classes too.
    assert all(len(found) == 1 for found in sides.values()) and set(sides) == {
        f"P{number}" for number in range(1, 7)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patient_column": "nobody"}, r"must have the column 'nobody' \(--patient-column\), got"),
        ({"patient_column": "gap"}, "row 3: 1.png has no gap"),
        ({"patient_column": "who"}, r"1 of 2 patients .* more than one split: x \(train, test\)"),
        ({"patient_pattern": "("}, "no regular expression"),
        ({"patient_pattern": r"\d"}, "must have one group"),
        ({"patient_pattern": r"([a-z])\d"}, "finds no patient in 4 of 4 paths"),
    ],
)  # fmt: skip
def test_what_cannot_be_grouped_is_refused(
    tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    lines = ["path,label,split,who,gap", "0.png,a,train,x,1", "1.png,b,train,y,"]
    lines += ["2.png,a,test,x,1", "3.png,b,val,y,1"]
    if arguments == {"patient_column": "who"}:
        lines = [line.replace("3.png,b,val", "3.png,b,train") for line in lines]
        arguments = {**arguments}
    with pytest.raises(ImageSetError, match=message):
        load_image_set(listed(tmp_path, lines), ratios=(1.0, 0.0, 0.0), **arguments)  # type: ignore[arg-type]


def test_folders_have_no_patient_column(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    with pytest.raises(ImageSetError, match="need a CSV list"):
        load_image_set(tmp_path, patient_column="who")
