"""Parameters and memory of every method at ViT-B, beside the published columns.

``python -m benchmarks.account`` counts one training step of each on fake tensors (no GPU, no
weights, no data) and prints the table; ``--write`` puts it into docs/methods.md, ``--json FILE``
writes the counts.  ``--device cuda`` runs the steps and prints what the allocator gave out as well.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cases import vit_b
from benchmarks.marked_block import write_block
from fpt_fast.accounting import Account, account
from fpt_fast.backbone import FrozenBackbone
from fpt_fast.backbone.vit import Embedding, FrozenBlock, FrozenVit
from fpt_fast.config import METHODS, preset
from fpt_fast.model import FptModel
from fpt_fast.peers import PEERS, PeerConfig, PeerModel
from fpt_fast.peers.side import SideMlp
from fpt_fast.records import BackboneSpec, FeatureBatch
from fpt_fast.selection import keep_count

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "tests" / "facts" / "published_results.json"
START, END = "<!-- account: begin -->", "<!-- account: end -->"
INPUT, BATCH, CLASSES = 512, 16, 5
NAMES = {
    "full": "full_fine_tuning",
    "linear": "linear_probing",
    "prompt": "prompt_tuning",
    "attention": "attention_tuning",
}
# Open in the papers.  With these, too, the trained share is the published one, and what is kept for
# the backward pass is in the published order throughout.
OTHERWISE: dict[str, dict[str, Any]] = {
    "lora": {"lora_targets": "attention", "rank": 11},
    "adapter": {"adapter_places": "mlp", "bottleneck": 96},
}


# The published shares of the other methods are those of the positions of 224 px.
PEERS_ON, FPT_ON = vit_b(224), vit_b(384)


def blank_backbone(spec: BackboneSpec, device: str = "meta") -> FrozenBackbone:
    """A frozen model of that shape, random, or without values on the meta device."""
    width = spec.hidden_size
    grid = (spec.image_size[0] // spec.patch_size[0], spec.image_size[1] // spec.patch_size[1])
    with torch.device(device):
        embedding = Embedding(
            nn.Conv2d(3, width, spec.patch_size, spec.patch_size),
            nn.Identity(),
            torch.zeros(1, spec.prefix_tokens, width),
            torch.zeros(1, spec.prefix_tokens + grid[0] * grid[1], width),
            grid,
            nn.Identity(),
        )
        blocks = [
            FrozenBlock(
                spec.num_heads,
                nn.LayerNorm(width),
                nn.Linear(width, 3 * width),
                nn.Linear(width, width),
                nn.LayerNorm(width),
                SideMlp(width),
            )
            for _ in range(spec.depth)
        ]
        vit = FrozenVit(embedding, blocks, nn.LayerNorm(width))
        return FrozenBackbone(
            vit,
            spec,
            device=torch.device(device),
            dtype=torch.float32,
            position_interpolation="timm",
        )


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is counted, and where: ``fake`` counts without values, ``cuda`` measures as well."""

    peers: BackboneSpec = PEERS_ON
    fpt: BackboneSpec = FPT_ON
    size: int = INPUT
    images: int = BATCH
    device: str = "fake"

    @property
    def place(self) -> str:
        """Where models and batches are made."""
        return "meta" if self.device == "fake" else self.device


AS_PUBLISHED = Setting()


def peer_account(
    method: str,
    attention: str = "plain",
    setting: Setting = AS_PUBLISHED,
    changes: Mapping[str, Any] | None = None,
) -> Account:
    """A peer; ViT-B has the positions of 224 px, which the published shares have."""
    config = PeerConfig.from_json({"method": method, "attention": attention, **(changes or {})})
    with torch.device(setting.place):
        model = PeerModel(config, blank_backbone(setting.peers, setting.place), CLASSES)
    batch = batch_of((setting.size, setting.size), setting)
    return account(model, batch, device=setting.device)


def fpt_account(method: str, setting: Setting = AS_PUBLISHED) -> Account:
    """FPT or FPT+, from preloaded features in f16."""
    with torch.device(setting.place):
        model = FptModel(preset(method), setting.fpt, CLASSES)
    spec, config = model.spec, model.config
    kept = keep_count(config.token_ratio, spec.num_tokens((setting.size, setting.size)))
    shape = (setting.images, len(model.layers), 2, spec.num_heads, kept, spec.head_width)
    kv = torch.zeros(shape, dtype=torch.float16, device=setting.place)
    batch = dataclasses.replace(batch_of(config.side_size, setting), kv=kv)
    return account(model, batch, device=setting.device)


def batch_of(size: tuple[int, int], setting: Setting) -> FeatureBatch:
    """A batch of black images of that size."""
    pixels = torch.zeros(setting.images, 3, *size, device=setting.place)
    labels = torch.zeros(setting.images, dtype=torch.int64, device=setting.place)
    return FeatureBatch(pixels, None, None, labels, ("",) * setting.images)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row: a method, its settings beside the defaults, with plain attention and with fused."""

    method: str
    changes: Mapping[str, Any]
    plain: Account
    fused: Account

    @property
    def label(self) -> str:
        """As on the command line of ``fpt-fast train --method``."""
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in self.changes.items()]
        return " ".join([self.method, *flags])


def accounts(setting: Setting) -> Iterator[Entry]:
    """Each method, most memory first as published; then as in ``OTHERWISE``, where it is there."""
    order = ("full", "lora", "attention", "prompt", "bitfit", "adapter", "linear")
    for method in (*order, *sorted(set(PEERS) - set(order))):
        for changes in ({}, OTHERWISE.get(method)):
            if changes is not None:
                kinds = ("plain", "fused")
                yield Entry(
                    method,
                    changes,
                    *(peer_account(method, kind, setting, changes) for kind in kinds),
                )
    for method in reversed(METHODS):
        counted = fpt_account(method, setting)
        yield Entry(method, {}, counted, counted)


def published(method: str) -> tuple[str, str]:
    """The published share in % and memory in MB: of table 1, or, of FPT+, the later table."""
    tables = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    row = tables["table1"].get(NAMES.get(method, method))
    row = row or tables["fpt_plus_table"].get(method)
    return (f"{row[0]:g}", f"{row[1]:,d}") if row else ("", "")


def table(rows: list[Entry]) -> str:
    """Markdown."""
    lines = [
        "| method | trained, % | published | memory, MB | published | kept for backward, MB | "
        "with fused attention: memory | kept |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share, memory = published(row.method)
        plain, fused = row.plain, row.fused
        cells = [
            f"`{row.label}`",
            f"{100 * plain.share:.3f}",
            share,
            *(megabytes(plain.peak_bytes), memory, megabytes(plain.saved_bytes)),
            *(megabytes(fused.peak_bytes), megabytes(fused.saved_bytes)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(rows: list[Entry]) -> str:
    """Markdown of what a GPU's allocator gave out."""
    lines = [
        "| method | allocated, MB | reserved, MB | published | fused: allocated | reserved |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        peaks = [
            "" if peak is None else megabytes(peak)
            for counted in (row.plain, row.fused)
            for peak in (counted.peak_allocated, counted.peak_reserved)
        ]
        cells = [f"`{row.label}`", *peaks[:2], published(row.method)[1], *peaks[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    """In units of 2^20 bytes, as PyTorch and nvidia-smi count them."""
    return f"{count / 2**20:,.0f}" if count >= 2**20 else f"{count / 2**20:.2f}"


def main() -> None:
    """Count, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/methods.md")
    parser.add_argument("--json", type=Path, help="file for the counts")
    parser.add_argument("--device", choices=("fake", "cuda"), default="fake")
    given = parser.parse_args()
    rows = list(accounts(Setting(device=given.device)))
    print(table(rows))
    if given.device == "cuda":
        print(f"\nMeasured on {torch.cuda.get_device_name()}:\n\n{measured(rows)}")
    if given.write:
        write_block(ROOT / "docs" / "methods.md", START, END, "\n" + table(rows) + "\n")
    if given.json is not None:
        values = {
            row.label: {"plain": row.plain.to_json(), "fused": row.fused.to_json()} for row in rows
        }
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
