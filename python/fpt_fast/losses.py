"""Training losses: cross-entropy with four weightings, focal, kappa, three regressions, and two of
several findings per image.

All take logits [B, outputs] and labels [B] i64 (of findings [B, findings], -1 where unknown), and
return a scalar f32, the batch's mean.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_fast.config import REGRESSION_LOSSES, ConfigError, TrainConfig


class EpochLoss(nn.Module):
    """A loss that may change from epoch to epoch; most do not."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch (0-based) begins."""


class CrossEntropyLoss(EpochLoss):
    """Cross-entropy; ``weight`` [classes] f32 is per class, or None for equal weights.

    In epoch ``e`` the weights are ``decay**e * weight + (1 - decay**e)``: with ``decay`` 1 they
    stay, with less they move towards equal.  The batch's mean is over the weights of its
    labels, as in ``torch.nn.CrossEntropyLoss``.
    """

    weight: Tensor | None
    current: Tensor | None

    def __init__(self, weight: Tensor | None = None, decay: float = 1.0) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("weight", weight, persistent=False)
        current = None if weight is None else weight.clone()
        self.register_buffer("current", current, persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Set the weights of ``epoch``."""
        if self.weight is not None and self.current is not None:
            factor = self.decay**epoch
            # In place: a captured step reads them where they are.
            self.current.copy_(factor * self.weight + (1.0 - factor))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, classes], labels [B] i64 -> scalar."""
        return F.cross_entropy(logits, labels, weight=self.current)


class FocalLoss(EpochLoss):
    """Focal loss, ``-alpha * (1 - p)**gamma * log p`` with ``p`` the label's probability.

    The defaults are those of the authors' code.  ``log p`` comes from ``log_softmax``, where the
    authors add 1e-6 to ``p`` against ``log 0``: the values differ by about that much.
    """

    def __init__(
        self,
        alpha: float = 5.0,
        gamma: float = 2.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if not (alpha > 0 and gamma >= 0):
            raise ValueError(f"alpha must be above 0 and gamma at least 0, got {alpha}, {gamma}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, classes], labels [B] i64 -> scalar, or [B] with ``reduction="none"``."""
        log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
        losses = -self.alpha * (1.0 - log_p.exp()).pow(self.gamma) * log_p
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()


class KappaLoss(EpochLoss):
    """Observed over expected disagreement of soft predictions: 1 - quadratic weighted kappa.

    ``scale="softmax"`` (default) takes the softmax probabilities as soft predictions.
    ``scale="square"`` is the authors' definition, squared outputs over their sum, which cannot
    tell a large negative logit from a large positive one although the predicted class is the
    largest logit; it is kept for comparison.
    """

    def __init__(self, scale: Literal["softmax", "square"] = "softmax", eps: float = 1e-10) -> None:
        super().__init__()
        if scale not in ("softmax", "square"):
            raise ValueError(f"scale must be 'softmax' or 'square', got {scale!r}")
        self.scale = scale
        self.eps = eps

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, classes], labels [B] i64 -> scalar, 0 when all are right."""
        classes = logits.shape[1]
        if self.scale == "softmax":
            soft = logits.softmax(dim=1)  # [B, classes]
        else:
            squared = logits.square()
            soft = squared / (self.eps + squared.sum(dim=1, keepdim=True))
        grades = torch.arange(classes, device=logits.device, dtype=soft.dtype)
        truth = (labels[:, None] == grades).to(soft.dtype)  # [B, classes]
        weights = ((grades[:, None] - grades[None, :]) / max(classes - 1, 1)).square()
        observed = (weights * (soft.T @ truth)).sum()
        chance = torch.outer(soft.sum(dim=0), truth.sum(dim=0)) / logits.shape[0]
        return observed / ((weights * chance).sum() + self.eps)


class RegressionLoss(EpochLoss):
    """Mean square error, mean absolute error or smooth L1 (Huber's, bent at 1) of one output
    against the label; with ``target`` (mean, deviation), against the label less the mean, over the
    deviation."""

    def __init__(self, kind: str, target: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.target = target
        if kind not in REGRESSION_LOSSES:
            raise ValueError(f"kind must be one of {', '.join(REGRESSION_LOSSES)}, got {kind!r}")
        self.kind = kind

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, 1], labels [B] i64 or f64 -> scalar."""
        if logits.dim() != 2 or logits.shape[1] != 1:
            raise ValueError(
                f"a regression loss needs one output, logits [B, 1], got {tuple(logits.shape)}"
            )
        # Not squeeze(): a batch of one image must stay a batch.
        if self.target is not None:
            labels = (labels - self.target[0]) / self.target[1]
        grades, target = logits[:, 0], labels.to(logits.dtype)
        if self.kind == "mean_square_error":
            return F.mse_loss(grades, target)
        if self.kind == "mean_absolute_error":
            return F.l1_loss(grades, target)
        return F.smooth_l1_loss(grades, target)


class FindingLoss(EpochLoss):
    """Binary cross-entropy of each finding, or its focal form; the mean over all that are known.

    ``weight`` [findings] f32 multiplies the loss of the images that have a finding (None: 1), and
    moves towards 1 as that of ``CrossEntropyLoss``.  With ``gamma`` above 0 each term is multiplied
    by ``alpha * (1 - p)**gamma``, ``p`` being the probability of what is true.
    """

    weight: Tensor | None
    current: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        decay: float = 1.0,
        *,
        alpha: float = 1.0,
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self.decay, self.alpha, self.gamma = decay, alpha, gamma
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("current", weight, persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Set the weights of ``epoch``."""
        if self.weight is not None:
            factor = self.decay**epoch
            self.current = factor * self.weight + (1.0 - factor)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, findings], labels [B, findings] of 1, 0, -1 -> scalar; 0 if none is known."""
        known = labels >= 0
        truth = labels.clamp(min=0).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(
            logits, truth, pos_weight=self.current, reduction="none"
        )
        if self.gamma:
            p = torch.sigmoid(torch.where(labels == 1, logits, -logits))
            losses = self.alpha * (1.0 - p).pow(self.gamma) * losses
        return torch.where(known, losses, 0.0).sum() / known.sum().clamp(min=1)


def balanced_weights(class_counts: Sequence[int]) -> Tensor:
    """Weights [classes] f32 inverse to the number of training images, the largest class at 1.

    Raises ``ConfigError`` where a class has no image: its weight would be infinite.
    """
    empty = [str(label) for label, count in enumerate(class_counts) if count <= 0]
    if empty or not class_counts:
        raise ConfigError(
            "balanced loss weights need at least one training image of every class, got none of "
            f"class {', '.join(empty) or '(no class at all)'}; add images, drop the class, or use "
            "loss_weight='none' or 'given'"
        )
    largest = max(class_counts)
    return torch.tensor([largest / count for count in class_counts], dtype=torch.float32)


def build_loss(
    config: TrainConfig,
    class_counts: Sequence[int] | None = None,
    *,
    num_classes: int | None = None,
) -> EpochLoss:
    """Build the loss that ``config`` names.

    ``class_counts``: training images per class in label order, needed for balanced weights (of
    findings: the images with each, then those without each).
    ``num_classes`` checks the number of given weights, and defaults to ``len(class_counts)``.
    Raises ``ConfigError`` where counts or weights are missing or do not fit.
    """
    if config.is_regression:
        return RegressionLoss(config.loss, config.target)
    if config.loss == "focal":
        return FocalLoss()
    if config.loss == "kappa":
        return KappaLoss()
    if config.has_findings:
        return _finding_loss(config, class_counts, num_classes)
    if config.loss_weight == "none":
        return CrossEntropyLoss()
    if num_classes is None and class_counts is not None:
        num_classes = len(class_counts)
    if config.loss_weight == "given":
        return CrossEntropyLoss(_given_weights(config.loss_weights, num_classes))
    if class_counts is None:
        raise ConfigError(
            f"loss_weight={config.loss_weight!r} needs class_counts, the number of training images "
            "of each class; pass them to fit() or build_loss()"
        )
    if len(class_counts) != num_classes:
        raise ConfigError(
            f"class_counts must have one entry for each of {num_classes} classes, "
            f"got {len(class_counts)}"
        )
    if config.loss_weight == "balance":
        return CrossEntropyLoss(balanced_weights(class_counts))
    if not 0.0 <= config.loss_weight_decay <= 1.0:
        raise ConfigError(f"loss_weight_decay must be in [0, 1], got {config.loss_weight_decay}")
    return CrossEntropyLoss(balanced_weights(class_counts), config.loss_weight_decay)


def _finding_loss(
    config: TrainConfig, counts: Sequence[int] | None, findings: int | None
) -> FindingLoss:
    if config.loss == "binary_focal":
        # gamma as of the focal loss above; alpha is a matter of the learning rate.
        return FindingLoss(gamma=2.0)
    if config.loss_weight == "none":
        return FindingLoss()
    if config.loss_weight == "given":
        return FindingLoss(_given_weights(config.loss_weights, findings))
    if counts is None or findings is None or len(counts) != 2 * findings:
        raise ConfigError(
            f"loss_weight={config.loss_weight!r} of findings needs class_counts, the training "
            "images with each finding, then those without each"
        )
    having, lacking = counts[:findings], counts[findings:]
    if min(having) < 1:
        raise ConfigError(
            "balanced loss weights need at least one training image with every finding, got none "
            f"with finding {[place for place, count in enumerate(having) if count < 1]}"
        )
    weight = torch.tensor([max(no, 1) / yes for yes, no in zip(having, lacking, strict=True)])
    return FindingLoss(weight, config.loss_weight_decay if config.loss_weight == "dynamic" else 1.0)


def _given_weights(weights: Sequence[float], num_classes: int | None) -> Tensor:
    if num_classes is not None and len(weights) != num_classes:
        raise ConfigError(
            f"loss_weights must have one weight for each of {num_classes} classes, "
            f"got {len(weights)}"
        )
    # A batch whose labels all weigh 0 has no mean.
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"loss_weights must be finite and above 0, got {tuple(weights)}")
    return torch.tensor(weights, dtype=torch.float32)
