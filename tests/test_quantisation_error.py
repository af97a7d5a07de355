"""The measurement behind docs/8-bit-features.md: order and size of the errors that it states."""

import dataclasses
import json

import torch

from benchmarks import demo_int8
from benchmarks.cases import FULL_PROMPT_CASES
from benchmarks.quantisation_error import DOCUMENT, END, START, compare, random_batch, random_model


def test_int8_costs_least_of_the_8_bit_forms_and_little() -> None:
    case = dataclasses.replace(FULL_PROMPT_CASES[0], images=2)
    errors = compare(random_model(), [random_batch(case)])
    f16, int8, e4m3, e5m2, others = (
        [float(cell) for cell in of_dtype.cells()] for of_dtype in errors.values()
    )
    for column in zip(f16, int8, e4m3, e5m2, others, strict=True):
        assert list(column) == sorted(column)
    _, _, attention, logits, probabilities = int8
    assert attention < 0.03 and logits < 0.002 and probabilities < 0.001
    sizes = {dtype: of_dtype.size for dtype, of_dtype in errors.items()}
    assert sizes[torch.float16] * 0.5 < sizes[torch.int8] < sizes[torch.float16] * 0.53


def test_the_document_has_a_row_of_every_dtype() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    tables = text.partition(START)[2].partition(END)[0]
    for name in ("float16", "int8", "float8_e4m3fn", "float8_e5m2", "another image's"):
        assert tables.count(f"| {name} |") == 2


def test_training_on_8_bits_is_as_good_as_on_f16() -> None:
    """The document tells what the committed result says, and that is what it claims."""
    found = json.loads(demo_int8.RESULTS.read_text(encoding="utf-8"))
    for dtype in ("int8", "float8_e4m3fn"):
        low, high = found[dtype]["difference_interval"]
        assert low <= 0 <= high
    text = DOCUMENT.read_text(encoding="utf-8")
    block = text.partition(demo_int8.START)[2].partition(demo_int8.END)[0]
    assert block.strip() == demo_int8.render(found)
