"""Losses against their formulas written out, and at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from fpt_fast.config import ConfigError, Loss, TrainConfig
from fpt_fast.losses import (
    CrossEntropyLoss,
    FocalLoss,
    KappaLoss,
    RegressionLoss,
    balanced_weights,
    build_loss,
)

COUNTS = [60, 30, 10]


def batch(size: int = 7, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return logits, torch.arange(size) % classes


def weighted_mean(logits: Tensor, labels: Tensor, weights: list[float]) -> float:
    total = above = 0.0
    for row, label in zip(logits.softmax(dim=1).tolist(), labels.tolist(), strict=True):
        above -= weights[label] * math.log(row[label])
        total += weights[label]
    return above / total


def test_plain_cross_entropy() -> None:
    logits, labels = batch()
    loss = build_loss(TrainConfig(), COUNTS)
    assert float(loss(logits, labels)) == pytest.approx(weighted_mean(logits, labels, [1, 1, 1]))


def test_balanced_weights_are_inverse_counts_with_the_largest_class_at_one() -> None:
    assert balanced_weights(COUNTS).tolist() == pytest.approx([1.0, 2.0, 6.0])
    logits, labels = batch()
    loss = build_loss(TrainConfig(loss_weight="balance"), COUNTS).double()
    for epoch in (0, 9):
        loss.set_epoch(epoch)
        assert float(loss(logits, labels)) == pytest.approx(
            weighted_mean(logits, labels, [1, 2, 6]), rel=1e-6
        )


def test_dynamic_weights_move_from_balanced_to_equal() -> None:
    logits, labels = batch()
    loss = build_loss(TrainConfig(loss_weight="dynamic", loss_weight_decay=0.5), COUNTS).double()
    assert isinstance(loss, CrossEntropyLoss)
    for epoch, weights in ((0, [1, 2, 6]), (1, [1, 1.5, 3.5]), (2, [1, 1.25, 2.25]), (60, [1] * 3)):
        loss.set_epoch(epoch)
        assert float(loss(logits, labels)) == pytest.approx(
            weighted_mean(logits, labels, weights), rel=1e-6
        )
    # Epochs may come in any order: a resumed run starts in the middle.
    loss.set_epoch(1)
    assert loss.current is not None
    assert loss.current.tolist() == pytest.approx([1, 1.5, 3.5])


def test_given_weights() -> None:
    logits, labels = batch()
    config = TrainConfig(loss_weight="given", loss_weights=(0.5, 3.0, 1.0))
    loss = build_loss(config, num_classes=3).double()
    loss.set_epoch(5)
    assert float(loss(logits, labels)) == pytest.approx(
        weighted_mean(logits, labels, [0.5, 3, 1]), rel=1e-6
    )


@pytest.mark.parametrize(
    ("weight", "counts", "match"),
    [
        ({"loss_weight": "balance"}, [5, 0, 3, 0], "none of class 1, 3"),
        ({"loss_weight": "dynamic"}, [5, 0, 3], "none of class 1;"),
        ({"loss_weight": "balance"}, [], "no class at all"),
        ({"loss_weight": "balance"}, None, "needs class_counts"),
        ({"loss_weight": "dynamic", "loss_weight_decay": 1.5}, COUNTS, r"in \[0, 1\], got 1.5"),
        ({"loss_weight": "given", "loss_weights": (1.0, 2.0)}, COUNTS, "each of 3 classes, got 2"),
        ({"loss_weight": "given", "loss_weights": (1.0, 0.0, 1.0)}, COUNTS, "above 0"),
        ({"loss_weight": "given", "loss_weights": (1.0, math.inf, 1.0)}, COUNTS, "finite"),
    ],
)
def test_weights_that_cannot_work(
    weight: dict[str, object], counts: list[int] | None, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        build_loss(TrainConfig(**weight), counts)  # type: ignore[arg-type]


def test_focal_is_the_authors_formula() -> None:
    logits, labels = batch()
    p = logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    expected = -5.0 * (1 - p) ** 2 * p.log()
    assert torch.allclose(FocalLoss(reduction="none")(logits, labels), expected)
    assert torch.allclose(FocalLoss()(logits, labels), expected.mean())
    assert torch.allclose(FocalLoss(reduction="sum")(logits, labels), expected.sum())
    plain = FocalLoss(alpha=1.0, gamma=0.0)(logits, labels)
    assert torch.allclose(plain, F.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="alpha must be above 0"):
        FocalLoss(alpha=0.0)
    with pytest.raises(ValueError, match="reduction"):
        FocalLoss(reduction="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["softmax", "square"])
def test_kappa_loss_of_hard_predictions_is_one_minus_kappa(scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (40,), generator=generator)
    predicted = torch.randint(0, 4, (40,), generator=generator)
    logits = 100.0 * F.one_hot(predicted, 4).double()
    kappa = cohen_kappa_score(labels, predicted, weights="quadratic")
    loss = KappaLoss(scale)(logits, labels)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(1 - kappa, rel=1e-9)
    assert float(KappaLoss()(100.0 * F.one_hot(labels, 4).double(), labels)) == pytest.approx(0.0)


def test_kappa_loss_scales() -> None:
    labels = torch.tensor([0, 1, 1])
    logits = torch.tensor([[-9.0, 1.0], [1.0, 9.0], [9.0, 1.0]])
    # The authors' squares cannot see the sign: the first row counts as right.
    assert torch.equal(KappaLoss("square")(logits, labels), KappaLoss("square")(-logits, labels))
    assert not torch.allclose(KappaLoss()(logits, labels), KappaLoss()(-logits, labels))
    with pytest.raises(ValueError, match="'softmax' or 'square'"):
        KappaLoss("cube")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "each"),
    [
        ("mean_square_error", lambda d: d * d),
        ("mean_absolute_error", abs),
        ("smooth_l1", lambda d: 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5),
    ],
)
def test_regression_losses(kind: Loss, each: object) -> None:
    logits = torch.tensor([[0.2], [3.5], [1.0]])
    labels = torch.tensor([0, 1, 2])
    loss = build_loss(TrainConfig(loss=kind, monitor="mae"))
    expected = [each(d) for d in (0.2, 2.5, -1.0)]  # type: ignore[operator]
    assert float(loss(logits, labels)) == pytest.approx(sum(expected) / 3)
    # A batch of one image is where squeeze() goes wrong.
    assert float(loss(logits[1:2], labels[1:2])) == pytest.approx(expected[1])
    with pytest.raises(ValueError, match=r"one output.*got \(3, 3\)"):
        loss(torch.zeros(3, 3), labels)
    with pytest.raises(ValueError, match="kind must be one of"):
        RegressionLoss("huber")


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "kappa"])
@pytest.mark.parametrize("labels", [[0], [1], [0, 0, 0], [2, 1]])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_small_batches_and_absent_classes_give_finite_gradients(
    name: Loss, labels: list[int], scale: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(len(labels), 3, generator=generator)).requires_grad_()
    loss = build_loss(TrainConfig(loss=name))(logits, torch.tensor(labels))
    loss.backward()
    assert loss.dim() == 0
    assert bool(loss.isfinite())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("loss", [FocalLoss(), KappaLoss(), KappaLoss("square")])
def test_gradients(loss: torch.nn.Module) -> None:
    logits, labels = batch(5)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (logits.requires_grad_(),))
