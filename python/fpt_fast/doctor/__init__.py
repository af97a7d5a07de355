"""What is wrong with a data folder, a cache or a run, and what to do about it."""

from fpt_fast.doctor.findings import Diagnosis, Finding
from fpt_fast.doctor.image_facts import ImageFacts, examine_images
from fpt_fast.doctor.image_rules import find_in_images
from fpt_fast.doctor.look_alikes import look_alike_pairs
from fpt_fast.doctor.padding_rules import find_in_padding
from fpt_fast.doctor.run_rules import find_in_run

__all__ = [
    "Diagnosis",
    "Finding",
    "ImageFacts",
    "examine_images",
    "find_in_images",
    "find_in_padding",
    "find_in_run",
    "look_alike_pairs",
]
