"""Pretrain the demo's frozen ViT on font glyphs in clutter, and export it in Hugging Face layout.

    python scripts/pretrain_demo_backbone.py --minutes 40 --work /tmp/demo_backbone

Three heads, all dropped at the end, make every token look for the glyph: each patch names the
glyph that covers it; the class token names the glyphs of the image; and so do the mean token and
randomly drawn patch tokens, so that attention flows from everywhere to the few glyph tokens.
That is what FPT's selection by column means needs. The run resumes from ``--work``.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_glyphs import NUM_GLYPHS, GlyphBatch, GlyphStream
from demo_vit import Shape, SmallViT, export
from torch import nn
from torch.utils.data import DataLoader

EXPORT = Path(__file__).resolve().parents[1] / "python/fpt_fast/demo/backbone"


class Heads(nn.Module):
    """The training's classifiers; ``middle`` reads the tokens between blocks 3 and 4 (0-based)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NUM_GLYPHS + 1))
        self.patch = nn.Linear(width, NUM_GLYPHS + 1)
        self.cls = nn.Linear(width, NUM_GLYPHS)
        self.token = nn.Linear(width, NUM_GLYPHS)


def compute_loss(
    model: SmallViT, heads: Heads, batch: GlyphBatch
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the losses, and the batch's accuracies (glyph patches, class token, mean token)."""
    x = model.embed(batch.images, batch.offset)
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i == 3:
            middle = heads.middle(x[:, 1:]).float()
    x = model.norm(x)
    labels, targets = batch.patch_labels, batch.glyph_targets
    patch, cls = heads.patch(x[:, 1:]).float(), heads.cls(x[:, 0]).float()
    drawn = x[:, 1 + torch.randint(x.shape[1] - 1, (24,))]
    token, mean = heads.token(drawn).float(), heads.token(x[:, 1:].mean(1)).float()
    spread = targets.unsqueeze(1).expand_as(token).flatten(0, 1)
    loss = (
        _dense(patch, labels)
        + 0.5 * _dense(middle, labels)
        + F.cross_entropy(cls, targets)
        + F.cross_entropy(token.flatten(0, 1), spread)
        + 0.5 * F.cross_entropy(mean, targets)
    )
    glyph = labels > 0
    with torch.no_grad():
        hits = (patch.argmax(-1) == labels)[glyph].float().mean()
        top = targets.gather(1, torch.stack([cls.argmax(1), mean.argmax(1)], 1)) > 0
        single = targets.amax(1) == 1
        found = top[single].float().mean(0)
    return loss, {"patch": float(hits), "cls": float(found[0]), "mean": float(found[1])}


def _dense(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Glyph patches and background weigh the same, however rare the glyphs are."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    glyph = labels.flatten() > 0
    return each[glyph].mean() + each[~glyph].mean()


class Run:
    """Model, optimiser, moving average and clock of one resumable run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape = Shape()
        torch.manual_seed(options.seed)
        self.model, self.average = SmallViT(self.shape), SmallViT(self.shape)
        self.heads = Heads(self.shape.hidden_size)
        self.average.load_state_dict(self.model.state_dict())
        # Muon takes the blocks' matrices: it learns in fewer steps than AdamW alone.
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        every = [*self.model.parameters(), *self.heads.parameters()]
        rest = [p for p in every if all(p is not m for m in matrices)]
        adamw = torch.optim.AdamW(rest, options.lr, (0.9, 0.98), weight_decay=0.01, fused=True)
        self.optimizers = [
            torch.optim.Muon(
                matrices, options.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            adamw,
        ]
        self.elapsed, self.step, self.images = 0.0, 0, 0
        self.file = options.work / "checkpoint.pt"

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "clock": (self.elapsed, self.step, self.images),
        }

    def save(self) -> None:
        self.options.work.mkdir(parents=True, exist_ok=True)
        torch.save(self.state(), self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        for name in ("model", "heads", "average"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.elapsed, self.step, self.images = state["clock"]

    def update(self, batch: GlyphBatch, progress: float) -> dict[str, float]:
        """One optimiser step; ``progress`` in 0..1 sets the learning rate."""
        lr = self.options.lr * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = max(lr, 1e-6) * min(1.0, (self.step + 1) / 200)
        with torch.autocast("cpu", torch.bfloat16):
            loss, numbers = compute_loss(self.model, self.heads, batch)
        self.model.zero_grad()
        self.heads.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.images += len(batch.images)
        keep = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - keep
            )
        return {"loss": float(loss.detach()), **numbers}


def train(options: argparse.Namespace) -> None:
    """Train until the budget is spent; log, checkpoint, export.

    The clock counts processor time over threads: minutes on an idle machine, so that a neighbour's
    load delays the schedule but does not cut it short.
    """
    torch.set_num_threads(options.threads)
    run = Run(options)
    if run.file.exists():
        run.load()
    budget = options.minutes * 60
    progress = torch.tensor([run.elapsed / budget]).share_memory_()
    stream = GlyphStream(progress, options.seed + run.step, options.tokens)
    loader = DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=3)
    last = time.process_time()
    saved, smooth = run.elapsed, {}
    for batch in loader:
        numbers = run.update(batch, run.elapsed / budget)
        now = time.process_time()
        run.elapsed, last = run.elapsed + (now - last) / options.threads, now
        progress[0] = run.elapsed / budget
        side = batch.images.shape[-1]
        for name, value in numbers.items():
            if value == value:  # a batch may hold no single-glyph image
                key = f"{name}{side}"
                smooth[key] = value + 0.95 * (smooth.get(key, value) - value)
        if run.step % 50 == 0:
            shown = " ".join(f"{k}={v:.3f}" for k, v in sorted(smooth.items()))
            clock = f"{time.strftime('%H:%M:%S')} {run.elapsed / 60:.1f} min"
            print(f"{clock} step {run.step} images {run.images} {shown}", flush=True)
        if run.elapsed - saved > 90 or run.elapsed >= budget:
            saved = run.elapsed
            run.save()
            export(run.average, run.shape, options.work / "export")
        if run.elapsed >= budget:
            break
    export(run.average, run.shape, options.export)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo_backbone"))
    parser.add_argument("--export", type=Path, default=EXPORT)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--tokens", type=int, default=8192, help="patch tokens in a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
