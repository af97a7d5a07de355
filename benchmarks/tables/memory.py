"""What training a row holds in memory, counted exactly on any machine (``fpt_fast.accounting``).

Rows that run the frozen model with every batch also hold its weights, and what its pass allocates
while it runs, which is measured on the CPU.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.beside import peak_added
from benchmarks.tables.variants import Options, Variant
from fpt_fast.accounting import Account, account
from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.config import PEER_METHODS
from fpt_fast.model import FptModel
from fpt_fast.peers import PeerModel
from fpt_fast.records import FeatureBatch
from fpt_fast.selection import keep_count, select_features


@dataclass(frozen=True)
class Memory:
    """A training step's account; bytes of a frozen model beside it, and at its pass's peak."""

    step: Account
    frozen_bytes: int = 0
    frozen_peak: int = 0

    @property
    def share(self) -> float:
        """Trained parameters of all, in percent."""
        return 100 * self.step.share

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of training: in the step, or in the frozen pass before it."""
        waiting = self.step.parameter_bytes + self.step.optimizer_bytes
        return self.frozen_bytes + max(self.step.peak_bytes, waiting + self.frozen_peak)


def memory_of(variant: Variant, options: Options, run: Path) -> Memory:
    """Count one training step of the model that ``run`` holds, on a batch of its sizes."""
    if variant.method in PEER_METHODS:
        peer = PeerModel.from_pretrained(run / "best", backbone=options.backbone)
        return Memory(account(peer, images_of(options, options.input_size, peer.num_outputs)))
    model = FptModel.from_pretrained(run / "best")
    backbone = load_backbone(options.backbone, device="cpu")
    step = account(model, batch_of(model, backbone, options))
    if variant.token_ratio is not None:
        return Memory(step)
    pixels = torch.randn(options.batch_size, 3, options.input_size, options.input_size)
    return Memory(
        step,
        frozen_bytes=sum(p.nbytes for p in backbone.vit.parameters()),
        frozen_peak=peak_added(lambda: features(model, backbone, pixels)),
    )


def features(model: FptModel, backbone: FrozenBackbone, pixels: Tensor) -> Tensor:
    """The frozen pass of one batch."""
    return select_features(
        backbone,
        pixels,
        layers=model.layers,
        token_ratio=model.config.token_ratio,
        importance=model.config.importance,
    ).kv


def batch_of(model: FptModel, backbone: FrozenBackbone, options: Options) -> FeatureBatch:
    """Random images, features and labels of a batch."""
    spec, size = backbone.spec, (options.input_size, options.input_size)
    batch = images_of(options, model.config.side_size[0], model.num_outputs)
    if not model.config.fusion:
        return batch
    keep = keep_count(model.config.token_ratio, spec.num_tokens(size))
    shape = (options.batch_size, len(model.layers), 2, spec.num_heads, keep, spec.head_width)
    return FeatureBatch(
        batch.side_pixels, torch.zeros(shape).half(), None, batch.labels, batch.keys
    )


def images_of(options: Options, size: int, outputs: int) -> FeatureBatch:
    """Images of ``size`` pixels and labels, without features."""
    count = options.batch_size
    labels = torch.arange(count) % outputs
    pixels = torch.zeros(count, 3, size, size)
    return FeatureBatch(pixels, None, None, labels, tuple(map(str, range(count))))
