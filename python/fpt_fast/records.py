"""Axis legend, and the frozen records that travel between stages.

Axis letters, used in every docstring, comment, test and benchmark:

====== ==================================================================
``B``  images of a batch
``M``  images of a resident feature store, of which ``rows`` picks ``B``
``L``  extracted layers of the frozen model
``H``  attention heads
``N``  tokens of the frozen model, class and register tokens included
``K``  kept tokens, ``int(token_ratio * N)``
``D``  width of one head
``C``  width of the frozen model, ``H * D``
``P``  prompts per extracted layer
``S``  width of the side network
``T``  tokens of the side network, class token included
``W``  models trained side by side
====== ==================================================================

A record is immutable, has a fixed set of fields, and carries no behaviour beyond
describing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    # The command line reads its settings, and so this module, without paying for torch.
    from pathlib import Path

    from torch import Tensor

# "auto", and the implementations of the op frozen_attention.
Attention = Literal[
    "auto",
    "native",
    "cpu",
    "flash",
    "efficient",
    "cudnn",
    "xformers",
    "blocked",
    "reference",
    "triton",
]
Importance = Literal["global", "class_token"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Task = Literal["multiclass", "multilabel", "regression"]

# What cut points between learned grades are chosen for, or that they stay at the halves.
GradeCuts = Literal["kappa", "accuracy", "halves"]
FeatureDtype = Literal["float16", "int8", "float8_e4m3fn"]

# Whether an image is stretched to the input's shape, or padded to it with black.
Fit = Literal["stretch", "pad"]

# One view of an image, or its mirror image too: of the side input alone, or of both inputs.
Views = Literal["one", "side", "both"]

UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class Reading:
    """How an image file is read; recorded in the cache's fingerprint.

    ``window`` says which levels become black to white: ``file``, ``full``, ``minmax``, or
    ``CENTRE/WIDTH`` (``images/windows.py``).  ``frame``: of a DICOM file of several frames, from
    1; None refuses such files.
    """

    window: str = "file"
    frame: int | None = None


AS_THE_FILE_SAYS = Reading()


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image of a data set.

    ``key`` is the path relative to the data set's root, in POSIX form: unique, and the
    only name by which features are ever looked up (never the file's stem).
    ``label`` indexes ``ImageSet.classes``, or is ``UNLABELLED``.  ``patient`` names whom the image
    is of, where that is known: the images of one never stand on two sides of a split.
    Of several findings per image, ``findings`` has 1, 0 or ``UNLABELLED`` for each of
    ``ImageSet.classes``, and ``label`` is ``UNLABELLED``.  Of a number per image, ``value`` is it,
    and ``label`` is ``UNLABELLED`` too.
    """

    key: str
    path: Path
    label: int
    split: Split
    reading: Reading = AS_THE_FILE_SAYS
    patient: str | None = None
    findings: tuple[int, ...] = ()
    value: float | None = None


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A data set: its root, its class names in label order, and its images in key order.

    ``task`` is ``multiclass`` (one class per image), ``multilabel`` (any of ``classes``, which
    are findings) or ``regression`` (a number, whose name is the only one in ``classes``).
    """

    root: Path
    classes: tuple[str, ...]
    items: tuple[ImageItem, ...]
    task: Task = "multiclass"

    def of_split(self, split: Split) -> tuple[ImageItem, ...]:
        """Return the images of one split, in key order."""
        return tuple(item for item in self.items if item.split == split)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What turns a decoded image into a network's input; recorded in the cache's fingerprint.

    ``size`` is (height, width) in pixels; ``mean`` and ``std`` are per channel, of values
    in [0, 1].  Resizing is bilinear with antialiasing, to exactly ``size``; with ``fit="pad"``
    the image is first padded with black to the shape of ``size``, so that nothing is distorted.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "stretch"


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Network input: ``pixels`` [B, 3, h, w] f32, normalised; ``keys`` name the images."""

    pixels: Tensor
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """What the rest of the library needs to know of a frozen model, without having it.

    ``weights_hash`` is an xxh3-128 of names and values of the parameters that the frozen
    pass reads, so that a cache can tell which weights made it.  ``patch_size`` and
    ``image_size`` (the size it was trained at) are (height, width) in pixels;
    ``prefix_tokens`` counts class and register tokens.
    """

    name: str
    weights_hash: str
    hidden_size: int
    num_heads: int
    depth: int
    patch_size: tuple[int, int]
    prefix_tokens: int
    has_class_token: bool
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def head_width(self) -> int:
        """Width ``D`` of one attention head."""
        return self.hidden_size // self.num_heads

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Tokens ``N`` of an input of ``size`` (height, width), prefix tokens included."""
        return self.prefix_tokens + (size[0] // self.patch_size[0]) * (
            size[1] // self.patch_size[1]
        )


@dataclass(frozen=True, slots=True)
class LayerStates:
    """Self-attention of one layer of the frozen model.

    ``q``, ``k``, ``v`` [B, H, N, D]; ``lse`` [B, H, N] f32 (natural-log row log-sum-exp of
    the scaled scores) and ``scores`` [B, H, N] f32 (global importance) where the attention
    produced them on its way, else None.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SelectedTokens:
    """Kept keys and values: ``kv`` [B, L, 2, H, K, D], ``index`` [B, L, H, K] i32, ascending.

    8-bit ``kv`` (int8, float8_e4m3fn) comes with f32 scales: ``k_scales`` [B, L, H, D], one for
    each channel of the keys, and ``v_scales`` [B, L, H, K], one for each value token; else None.
    """

    kv: Tensor
    index: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KeptFeatures:
    """The features of a batch: fields as in ``FeatureBatch``, which they become a part of."""

    kv: Tensor
    rows: Tensor | None = None
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """What the model learns from, wherever it came from.

    ``side_pixels`` [B, 3, h, w] f32; ``kv`` [M, L, 2, H, K, D], or None for a side network
    alone; ``rows`` [B] i64 picks the batch's images out of ``kv``, or None when M is B and
    the order is the same; ``labels`` [B] i64, or [B, findings] i64 of 1, 0 or ``UNLABELLED`` where
    an image may have several findings, or [B] f64 of a number per image.  8-bit ``kv`` (int8 or
    fp8) comes with ``k_scales`` [M, L, H, D] f32, per channel of K, and ``v_scales`` [M, L, H, K]
    f32, per token of V; both are None with any other.
    """

    side_pixels: Tensor
    kv: Tensor | None
    rows: Tensor | None
    labels: Tensor
    keys: tuple[str, ...]
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SweepBatch:
    """A batch for several models: ``shared`` by all but for the side input, which is augmented
    for each seed: ``side_pixels`` [seeds, B, 3, h, w] f32."""

    side_pixels: Tensor
    shared: FeatureBatch


@dataclass(frozen=True, slots=True)
class Predictions:
    """Model output on a split: ``logits`` and ``probabilities`` [images, classes] f32 on the CPU,
    ``labels`` [images] i64 (``UNLABELLED`` where unknown).

    Of a regression model, ``logits`` is [images, 1] and ``probabilities`` is None; where the labels
    are grades, ``cuts`` are the points between them, the first between grades 0 and 1 (None: at
    the halves).  Of several findings per image, ``labels`` is [images, findings] of 1, 0 or
    ``UNLABELLED``, and each probability its own.  Of a number per image, ``labels`` [images] f64
    (NaN where unknown) and ``logits`` are in its unit.
    """

    keys: tuple[str, ...]
    labels: Tensor
    logits: Tensor
    probabilities: Tensor | None
    cuts: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch of training: 0-based number, mean loss, last learning rate, wall seconds,
    and the metrics of the validation split by name (empty where it was not evaluated)."""

    epoch: int
    loss: float
    learning_rate: float
    seconds: float
    val: dict[str, float]


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """All epochs of a run, and which one was best by the monitored metric (None: none was)."""

    epochs: tuple[EpochRecord, ...]
    monitor: str
    best_epoch: int | None
    best_value: float | None


@dataclass(frozen=True, slots=True)
class TokenExample:
    """An image with what was kept of it, and where the prompts look.

    ``pixels`` [3, h, w] u8; ``index`` [L, H, K] i32 with ``prefix_tokens`` first and then
    the patches of a ``grid`` (rows, columns), row by row; probabilities [classes] (of a
    regression, [0]); ``weights`` [L, H, P, K] f32, the prompts' attention over the kept tokens,
    or None where nobody asked.  Of a regression ``output`` is the predicted number, or the grade,
    which ``grade`` is the class of; ``value`` the true number, where the labels are such.
    """

    key: str
    pixels: Tensor
    index: Tensor
    layers: tuple[int, ...]
    grid: tuple[int, int]
    prefix_tokens: int
    label: int
    probabilities: Tensor
    weights: Tensor | None = None
    findings: tuple[int, ...] = ()
    output: float | None = None
    grade: int | None = None
    value: float | None = None
