"""What a model card is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made of.

    ``config``, ``training`` and ``features`` as in a run's ``config.yaml``; ``metrics`` as in its
    ``metrics.json``; ``several``: an image may have any number of the ``classes``; ``target``: mean
    and deviation of the number that it predicts, whose name is the only class; ``graded``: it
    predicts a grade, which the classes are cut from; ``temperatures``:
    what calibrates the logits, one number or one for each finding; ``base_model``
    the frozen model's repository on the hub, if it has one; ``frozen_folder``: it was a folder,
    which whoever has the model must name.  ``data_set``, ``license``,
    ``intended_use`` and ``contact`` are the author's words, empty where not given.
    """

    name: str
    classes: Sequence[str]
    method: Mapping[str, Any]
    training: Mapping[str, Any]
    features: Mapping[str, Any]
    metrics: Mapping[str, Any]
    parameters: int
    version: str
    several: bool = False
    target: Sequence[float] | None = None
    graded: bool = False
    temperatures: Sequence[float] | None = None
    base_model: str = ""
    frozen_folder: bool = False
    repository: str = ""
    data_set: str = ""
    license: str = ""
    intended_use: str = ""
    contact: str = ""
