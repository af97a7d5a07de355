"""Parameters and memory of every method at ViT-B, beside the published columns.

``python -m benchmarks.account`` counts one training step of each on fake tensors (no GPU, no
weights, no data) and prints the table; ``--write`` puts it into docs/methods.md, ``--json FILE``
writes the counts.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

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


def vit_b(image: int) -> BackboneSpec:
    """ViT-B/16 with the positions of an ``image`` of that many pixels."""
    halves = (0.5, 0.5, 0.5)
    name = f"vit_base_patch16_{image}"
    return BackboneSpec(
        name, "0" * 32, 768, 12, 12, (16, 16), 1, True, (image, image), halves, halves
    )


def blank_backbone(spec: BackboneSpec) -> FrozenBackbone:
    """A frozen model of that shape without values, on the meta device."""
    width = spec.hidden_size
    grid = (spec.image_size[0] // spec.patch_size[0], spec.image_size[1] // spec.patch_size[1])
    device = torch.device("meta")
    with device:
        embedding = Embedding(
            nn.Conv2d(3, width, spec.patch_size, spec.patch_size),
            nn.Identity(),
            torch.empty(1, spec.prefix_tokens, width),
            torch.empty(1, spec.prefix_tokens + grid[0] * grid[1], width),
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
            vit, spec, device=device, dtype=torch.float32, position_interpolation="timm"
        )


def peer_account(method: str, attention: str = "plain", **changes: object) -> Account:
    """A peer on ViT-B at 512 px, with the positions of 224 px, which the published shares have."""
    config = PeerConfig.from_json({"method": method, "attention": attention, **changes})
    with torch.device("meta"):
        model = PeerModel(config, blank_backbone(vit_b(224)), CLASSES)
    return account(model, batch_of((INPUT, INPUT)))


def fpt_account(method: str) -> Account:
    """FPT or FPT+ on ViT-B at 512 px, from preloaded features in f16."""
    with torch.device("meta"):
        model = FptModel(preset(method), vit_b(384), CLASSES)
    spec, config = model.spec, model.config
    kept = keep_count(config.token_ratio, spec.num_tokens((INPUT, INPUT)))
    shape = (BATCH, len(model.layers), 2, spec.num_heads, kept, spec.head_width)
    kv = torch.empty(shape, dtype=torch.float16, device="meta")
    return account(model, dataclasses.replace(batch_of(config.side_size), kv=kv))


def batch_of(size: tuple[int, int]) -> FeatureBatch:
    """A batch of images of that size, without values."""
    pixels = torch.empty(BATCH, 3, *size, device="meta")
    labels = torch.empty(BATCH, dtype=torch.int64, device="meta")
    return FeatureBatch(pixels, None, None, labels, ("",) * BATCH)


def accounts() -> Iterator[tuple[str, Account, Account]]:
    """Each method, most memory first as published: with plain attention, and with fused."""
    order = ("full", "lora", "attention", "prompt", "bitfit", "adapter", "linear")
    for method in (*order, *sorted(set(PEERS) - set(order))):
        yield method, peer_account(method), peer_account(method, "fused")
    for method in reversed(METHODS):
        counted = fpt_account(method)
        yield method, counted, counted


def published(method: str) -> tuple[str, str]:
    """The published share in % and memory in MB: of table 1, or, of FPT+, the later table."""
    tables = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    row = tables["table1"].get(NAMES.get(method, method))
    row = row or tables["fpt_plus_table"].get(method)
    return (f"{row[0]:g}", f"{row[1]:,d}") if row else ("", "")


def table(rows: list[tuple[str, Account, Account]]) -> str:
    """Markdown."""
    lines = [
        "| method | trained, % | published | memory, MB | published | kept for backward, MB | "
        "with fused attention: memory | kept |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, plain, fused in rows:
        share, memory = published(method)
        cells = [
            f"`{method}`",
            f"{100 * plain.share:.3f}",
            share,
            *(megabytes(plain.peak_bytes), memory, megabytes(plain.saved_bytes)),
            *(megabytes(fused.peak_bytes), megabytes(fused.saved_bytes)),
        ]
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
    given = parser.parse_args()
    rows = list(accounts())
    print(table(rows))
    if given.write:
        write_block(ROOT / "docs" / "methods.md", START, END, "\n" + table(rows) + "\n")
    if given.json is not None:
        values = {m: {"plain": p.to_json(), "fused": f.to_json()} for m, p, f in rows}
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
