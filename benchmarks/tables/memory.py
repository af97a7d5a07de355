"""What training a row holds in memory, counted exactly on a CPU.

``peak`` is what a GPU's allocator would have to hand out, but for its rounding and for scratch
memory of kernels: weights, gradients and AdamW's state, and the larger of what PyTorch allocates
in one training step with the batch's features, and in the frozen pass where there is one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.beside import peak_added
from benchmarks.tables.variants import Options, Variant
from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.config import PEER_METHODS
from fpt_fast.model import FptModel
from fpt_fast.peers import PeerModel
from fpt_fast.records import FeatureBatch
from fpt_fast.selection import keep_count, select_features


@dataclass(frozen=True)
class Memory:
    """Bytes, and counts of parameters; ``all_parameters`` has the frozen model's."""

    trained_parameters: int
    all_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    feature_bytes: int
    step_peak: int
    frozen_bytes: int
    frozen_peak: int

    @property
    def share(self) -> float:
        """Trained parameters of all, in percent."""
        return 100 * self.trained_parameters / self.all_parameters

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of training."""
        static = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return (
            static
            + self.frozen_bytes
            + self.feature_bytes
            + max(self.step_peak, self.frozen_peak - self.feature_bytes)
        )


def memory_of(variant: Variant, options: Options, run: Path) -> Memory:
    """Count one training step of the model that ``run`` holds, on random input of its sizes."""
    if variant.method in PEER_METHODS:
        peer = PeerModel.from_pretrained(run / "best", backbone=options.backbone).train()
        return counted(peer, images_of(options, options.input_size, peer.num_outputs))
    backbone = load_backbone(options.backbone, device="cpu")
    model = FptModel.from_pretrained(run / "best").train()
    weights = list(backbone.vit.parameters())
    memory = counted(model, batch_of(model, backbone, options))
    if not model.config.fusion:
        return memory
    memory = replace(
        memory, all_parameters=memory.trained_parameters + sum(p.numel() for p in weights)
    )
    if variant.token_ratio is not None:
        return memory
    pixels = torch.randn(options.batch_size, 3, options.input_size, options.input_size)
    return replace(
        memory,
        frozen_bytes=sum(p.nbytes for p in weights),
        frozen_peak=peak_added(lambda: features(model, backbone, pixels)),
    )


def counted(model: nn.Module, batch: FeatureBatch) -> Memory:
    """One training step; the model's own frozen weights count as parameters in memory."""
    sizes = [(p.numel(), p.nbytes) for p in model.parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    step = step_of(model, batch)
    step()  # makes gradients and AdamW's state, which are counted by themselves
    return Memory(
        trained_parameters=sum(p.numel() for p in trained),
        all_parameters=sum(count for count, _ in sizes),
        parameter_bytes=sum(size for _, size in sizes),
        gradient_bytes=sum(p.nbytes for p in trained),
        optimizer_bytes=2 * sum(p.nbytes for p in trained),
        saved_bytes=saved_bytes(model, lambda: loss_of(model, batch)),
        feature_bytes=0 if batch.kv is None else batch.kv.nbytes,
        step_peak=peak_added(step),
        frozen_bytes=0,
        frozen_peak=0,
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
    keep = keep_count(model.config.token_ratio, spec.num_tokens(size))
    shape = (options.batch_size, len(model.layers), 2, spec.num_heads, keep, spec.head_width)
    batch = images_of(options, model.config.side_size[0], model.num_outputs)
    return replace(batch, kv=torch.randn(shape).half()) if model.config.fusion else batch


def images_of(options: Options, size: int, outputs: int) -> FeatureBatch:
    """Random images of ``size`` pixels and labels, without features."""
    count = options.batch_size
    labels = torch.randint(outputs, (count,))
    pixels = torch.randn(count, 3, size, size)
    return FeatureBatch(pixels, None, None, labels, tuple(map(str, range(count))))


def loss_of(model: nn.Module, batch: FeatureBatch) -> Tensor:
    """Cross-entropy of a forward pass."""
    return functional.cross_entropy(model(batch), batch.labels)


def step_of(model: nn.Module, batch: FeatureBatch) -> Callable[[], None]:
    """A whole training step; gradients stay, as they do between the steps of training."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.step()

    return step


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # or a freed storage's address could be counted as another's

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(kept.values())
