"""Measure a demo backbone on the needle data set, in plain PyTorch, apart from the library.

    python scripts/demo_probe.py --backbone python/fpt_fast/demo/backbone --layers 3 4 5

Prints linear probes of the class and the mean token, the share of digits whose tokens FPT's
selection keeps, and the test AUC of a plain FPT+ and of its side network alone.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_vit import PATCH, Block, Shape, SmallViT, load_backbone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.io import read_image

SPLITS = ("train", "val", "test")
SIDE_PX, PROMPTS, RATIO = 64, 16, 0.2


@dataclass(frozen=True)
class Features:
    """cls, mean [M,C] · kv [M,L,2,H,K,D] f16 · hit [M,L,H] f32, the share of the digit's tokens
    kept · labels [M] · split [M] · small [M,3,64,64] f32."""

    cls: torch.Tensor
    mean: torch.Tensor
    kv: torch.Tensor
    hit: torch.Tensor
    labels: torch.Tensor
    split: torch.Tensor
    small: torch.Tensor


@torch.inference_mode()
def extract(model: SmallViT, data: Path, limit: int) -> Features:
    """One frozen pass over the data set, all layers."""
    rows = list(csv.DictReader((data / "boxes.csv").open()))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:limit]]
    classes = sorted({row["path"].split("/")[1] for row in rows})
    parts: list[tuple[torch.Tensor, ...]] = []
    for row in rows:
        split, label, _ = row["path"].split("/")
        image = read_image(str(data / row["path"]))[None]
        digit = _digit_tokens(
            [int(row[k]) for k in ("top", "left", "height", "width")], image.shape[-1] // PATCH
        )
        kv, hits = [], []
        with torch.autocast("cpu", torch.bfloat16):
            x = model.embed(image)
            for block in model.blocks:
                q, k, v = block.project(x)
                scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float()
                column = scores.softmax(-1).mean(-2)[0]  # [H,N]
                index = column.topk(int(RATIO * column.shape[-1])).indices.sort().values
                kv.append(torch.stack([_take(k[0], index), _take(v[0], index)]))
                hits.append(torch.stack([torch.isin(digit, kept).float().mean() for kept in index]))
                x = block(x)
            x = model.norm(x).float()
        small = F.interpolate(image / 255.0, size=SIDE_PX, mode="bilinear", antialias=True)
        parts.append(
            (
                x[0, 0],
                x[0, 1:].mean(0),
                torch.stack(kv).half(),
                torch.stack(hits),
                torch.tensor(classes.index(label)),
                torch.tensor(SPLITS.index(split)),
                (small[0] - 0.5) / 0.25,
            )
        )
    return Features(*(torch.stack(p) for p in zip(*parts, strict=True)))


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _digit_tokens(box: list[int], grid: int) -> torch.Tensor:
    """Token indices, class token first, of the patches that the middle of the digit's box meets."""
    top, left, height, width = box
    margin = height // 6
    rows = range((top + margin) // PATCH, (top + height - margin - 1) // PATCH + 1)
    columns = range((left + margin) // PATCH, (left + width - margin - 1) // PATCH + 1)
    return torch.tensor([1 + r * grid + c for r in rows for c in columns])


class PlainFptPlus(nn.Module):
    """FPT+ as DESIGN.md section 2 has it; ``fuse=False`` is the side network alone."""

    def __init__(self, width: int, heads: int, layers: int, classes: int, fuse: bool) -> None:
        super().__init__()
        side = width // 8
        self.fuse, self.heads = fuse, heads
        self.prompts = nn.Parameter(torch.randn(layers, 1, PROMPTS, width) * 1e-6)
        self.norm, self.out_proj = nn.LayerNorm(width), nn.Linear(width, side)
        self.drop = nn.Dropout(0.5)
        self.patch = nn.Conv2d(3, side, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, side) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (SIDE_PX // PATCH) ** 2, side) * 0.02)
        shape = Shape(side, layers, heads, 4 * side)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(side), nn.Linear(side, classes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, small: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        x = self.patch(small).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions
        for i, block in enumerate(self.blocks):
            if not self.fuse:
                x = block(x)
                continue
            q = self.norm(self.prompts[i]).view(PROMPTS, self.heads, -1).transpose(0, 1)
            k, v = kv[:, i].unbind(1)  # [B,H,K,D]
            out = F.scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)
            state = self.out_proj(out.transpose(1, 2).flatten(2) + self.prompts[i])
            x = block(torch.cat([x, self.drop(state)], 1))[:, :-PROMPTS]
        return self.head(self.last(x)[:, 0])


def train_plain(
    data: Features, layers: list[int], lr: float, epochs: int, fuse: bool, seed: int = 0
) -> tuple[float, float, list[float]]:
    """Validation and test AUC at the best validation epoch, and the test AUC every 5 epochs."""
    torch.manual_seed(seed)
    heads, width = data.kv.shape[3], data.cls.shape[1]
    model = PlainFptPlus(width, heads, len(layers), int(data.labels.max()) + 1, fuse)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    picked = data.kv[:, layers]
    train = (data.split == 0).nonzero().flatten()
    steps, done = epochs * -(-len(train) // 16), 0
    best, curve = (-1.0, 0.0), []
    for epoch in range(epochs):
        model.train()
        for rows in train[torch.randperm(len(train))].split(16):
            optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * np.cos(np.pi * done / steps))
            small = data.small[rows]
            small = small.flip(-1) if torch.rand(()) < 0.5 else small
            loss = F.cross_entropy(model(small, picked[rows].float()), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
        val, test = (_auc(model, data, picked, s) for s in (1, 2))
        best = max(best, (val, test))
        if epoch % 5 == 4:
            curve.append(round(test, 3))
    return *best, curve


@torch.inference_mode()
def _auc(model: nn.Module, data: Features, picked: torch.Tensor, split: int) -> float:
    rows = (data.split == split).nonzero().flatten()
    chance = torch.cat(
        [model.eval()(data.small[r], picked[r].float()).softmax(1) for r in rows.split(64)]
    )
    return float(roc_auc_score(data.labels[rows].numpy(), chance.numpy(), multi_class="ovr"))


def linear_probe(features: torch.Tensor, data: Features) -> float:
    """Test AUC of logistic regression on features [M,C]."""
    train, test = data.split == 0, data.split == 2
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(features[train].numpy(), data.labels[train].numpy())
    chance = model.predict_proba(features[test].numpy())
    return float(roc_auc_score(data.labels[test].numpy(), chance, multi_class="ovr"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, default=Path("python/fpt_fast/demo/backbone"))
    parser.add_argument("--data", type=Path, default=Path("/tmp/needle"))
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--limit", type=int, default=800, help="about this many images")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = extract(load_backbone(options.backbone), options.data, options.limit)
    print(
        f"linear probe, test AUC: class token {linear_probe(data.cls, data):.4f}, "
        f"mean token {linear_probe(data.mean, data):.4f}"
    )
    for i in range(data.hit.shape[1]):
        share = data.hit[:, i].mean(0)
        print(
            f"layer {i}: digit tokens kept, mean over heads {share.mean():.3f}, "
            f"per head {[round(float(s), 2) for s in share]}"
        )
    for lr in options.lr:
        val, test, curve = train_plain(data, options.layers, lr, options.epochs, True)
        print(f"FPT+ layers {options.layers} lr {lr}: val {val:.4f} test {test:.4f} {curve}")
    val, test, _ = train_plain(data, options.layers, options.lr[0], options.epochs, False)
    print(f"side network alone: val {val:.4f} test {test:.4f}")


if __name__ == "__main__":
    main()
