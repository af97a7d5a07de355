"""Each peer alone: what moves, what is saved, and that a fresh one is the frozen model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.config import ConfigError
from fpt_fast.model import create_model
from fpt_fast.model_files import ModelFileError
from fpt_fast.peers import PEERS, PeerModel
from fpt_fast.records import FeatureBatch
from helpers import relative_error, spread_weights, tiny_vit

# What each method must move, as patterns of parameter names; the head always moves.
MOVES = {
    "full": r"network\..*",
    "linear": r"(?!)",
    "prompt": r"network\.edit\.tokens",
    "attention": r"network\.vit\.blocks\.\d+\.(qkv|proj)\.(weight|bias)",
    "adapter": r"network\.vit\.blocks\.\d+\.(proj|mlp)\.1\.(down|up)\.(weight|bias)",
    "bitfit": r"network\.vit\..*bias",
    "lora": r"network\.vit\.blocks\.\d+\.qkv\.lora_[AB]\.default\.weight",
    "side": r"network\.(narrow|gates|blocks|norm|widen).*",
}
# A width of 48 on 3 heads is not divided by 8.
CHANGES: dict[str, dict[str, Any]] = {"side": {"side_reduction": 4}, "lora": {"rank": 3}}
# Those whose first output is that of the frozen model.
UNCHANGED = ("full", "linear", "attention", "bitfit", "lora")


def backbone(**changes: Any) -> FrozenBackbone:
    vit = spread_weights(tiny_vit(**changes), scale=0.1)
    return load_backbone(vit, dtype="float32", device="cpu")


def peer(method: str, frozen: FrozenBackbone | None = None, **changes: Any) -> PeerModel:
    changes = CHANGES.get(method, {}) | changes
    model = create_model(method, backbone=frozen or backbone(), num_classes=3, **changes)
    assert isinstance(model, PeerModel)
    return model


def a_batch(size: tuple[int, int] = (40, 24)) -> FeatureBatch:
    pixels = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(1))
    return FeatureBatch(pixels, None, None, torch.tensor([0, 1, 2, 0]), tuple("abcd"))


def step(model: PeerModel, batch: FeatureBatch, steps: int = 2) -> Tensor:
    """A few steps of the recipe; returns the first loss's logits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    first = None
    for _ in range(steps):
        optimiser.zero_grad()
        logits = model(batch)
        first = logits.detach() if first is None else first
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        optimiser.step()
    assert first is not None
    return first


@pytest.mark.parametrize("method", PEERS)
def test_only_the_right_parameters_move(method: str) -> None:
    model = peer(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, a_batch())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    right = {n for n in before if re.fullmatch(MOVES[method] + r"|head\.(weight|bias)", n)}
    assert moved == right
    assert moved == set(model.state_dict())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == right


@pytest.mark.parametrize(
    ("method", "changes", "moves"),
    [
        ("adapter", {"adapter_places": "mlp"}, r"\.mlp\.1\.(down|up)\.(weight|bias)"),
        ("lora", {"lora_targets": "attention"}, r"\.(qkv|proj)\.lora_[AB]\.default\.weight"),
    ],
)
def test_other_places_move_other_parameters(
    method: str, changes: dict[str, Any], moves: str, tmp_path: Path
) -> None:
    frozen = backbone()
    model = peer(method, frozen, **changes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, a_batch())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    pattern = rf"network\.vit\.blocks\.\d+{moves}|head\.(weight|bias)"
    right = {n for n in before if re.fullmatch(pattern, n)}
    assert moved == right and len(right) == 2 + 4 * frozen.spec.depth
    model.save_pretrained(tmp_path)
    again = PeerModel.from_pretrained(tmp_path, backbone=frozen)
    with torch.no_grad():
        assert torch.equal(again(a_batch()), model.eval()(a_batch()))


@pytest.mark.parametrize("method", PEERS)
def test_saved_and_loaded_it_says_the_same(method: str, tmp_path: Path) -> None:
    frozen = backbone()
    model = peer(method, frozen)
    step(model, a_batch())
    model.save_pretrained(tmp_path / "best", extra={"classes": ["a", "b", "c"]})
    again = PeerModel.from_pretrained(tmp_path / "best", backbone=frozen)
    assert again.extra == {"classes": ["a", "b", "c"]}
    assert again.config == model.config and not again.training
    with torch.no_grad():
        assert torch.equal(again(a_batch()), model.eval()(a_batch()))
    again.train()
    step(again, a_batch())  # it can be trained on


@pytest.mark.parametrize("method", UNCHANGED)
@pytest.mark.parametrize(
    "changes",
    [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}],
    ids=["class token", "no class token", "registers"],
)
def test_at_first_it_is_the_frozen_model(method: str, changes: dict[str, Any]) -> None:
    frozen = backbone(**changes)
    model = peer(method, frozen)
    batch = a_batch()
    with torch.no_grad():
        expected = model.head(frozen.features(batch.side_pixels))
    assert relative_error(model(batch), expected) < 1e-5


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_prompts_that_nobody_heeds_change_nothing(depth: str) -> None:
    """Keys far away from every query: the prompts are there, and take no part."""
    frozen = backbone(class_token=False, global_pool="avg")
    model = peer("prompt", frozen, prompt_depth=depth, num_prompts=5)
    prompts = model.network.edit
    assert prompts.tokens.shape == (4 if depth == "deep" else 1, 5, 48)
    x = torch.randn(2, 15, 48)
    inserted = prompts.insert(x, 0)
    assert inserted.shape == (2, 20, 48)
    assert torch.equal(inserted[:, :5], prompts.tokens[0].expand(2, -1, -1))
    assert torch.equal(prompts.remove(inserted), x)
    behind = prompts.insert(inserted, 1)
    if depth == "shallow":
        assert behind is inserted
    else:
        assert torch.equal(behind[:, :5], prompts.tokens[1].expand(2, -1, -1))
        assert torch.equal(behind[:, 5:], x)


@pytest.mark.parametrize("method", ["full", "prompt", "attention", "adapter", "lora", "side"])
def test_checkpointing_gives_the_same_gradients(method: str) -> None:
    frozen, batch = backbone(), a_batch()
    models = [peer(method, frozen, gradient_checkpointing=on) for on in (False, True)]
    for model in models:
        model(batch).square().mean().backward()
    ours = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name].grad, parameter.grad)


@pytest.mark.parametrize("method", PEERS)
def test_mixed_precision_keeps_weights_and_comes_near(method: str) -> None:
    frozen, batch = backbone(), a_batch()
    exact, mixed = (peer(method, frozen, mixed_precision=on) for on in (False, True))
    logits = step(mixed, batch, steps=1)
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert logits.dtype == torch.float32
    assert 0 < relative_error(logits, exact(batch).detach()) < 0.05


def test_plain_attention_is_the_fused_one() -> None:
    frozen, batch = backbone(), a_batch()
    fused, plain = (peer("full", frozen, attention=kind) for kind in ("fused", "plain"))
    assert relative_error(plain(batch), fused(batch).detach()) < 1e-5


def test_pruned_ladder_begins_with_the_frozen_weights() -> None:
    frozen = backbone()
    model = peer("side", frozen)
    vit = frozen.vit
    written = sum(
        layer.weight.abs().sum(1) for block in vit.blocks for layer in (block.proj, block.mlp.fc2)
    )
    channels = written.topk(12).indices.sort().values
    assert torch.equal(model.network.norm.weight, vit.norm.weight[channels])
    first, side = vit.block(0), model.network.block(0)
    assert torch.equal(side.norm1.weight, first.norm1.weight[channels])
    rows = [
        (first.qkv.weight[:, channels] == row).all(1).nonzero().item() for row in side.qkv.weight
    ]
    heads = torch.tensor(rows).reshape(3, 3, 4)  # query, key, value; head; kept of 16
    assert torch.equal(heads // 16, torch.arange(9).reshape(3, 3, 1).expand(-1, -1, 4))
    assert torch.equal(heads[0] % 48, heads[1] % 48)
    assert peer("side", frozen, side_init="random").network.block(0).qkv.weight.std() < 0.03


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    frozen = backbone()
    with pytest.raises(ConfigError, match="multiple of the frozen model's 3 heads"):
        create_model("side", backbone=frozen, num_classes=3, side_reduction=12)
    with pytest.raises(ConfigError, match="description does not do"):
        create_model("lora", backbone=frozen.spec, num_classes=3)
    with pytest.raises(ConfigError, match="bottleneck belongs to method='adapter'"):
        peer("full", bottleneck=3)
    with pytest.raises(ConfigError, match="prompt_depth must be 'deep' or 'shallow'"):
        peer("prompt", prompt_depth="middle")
    with pytest.raises(ConfigError, match="adapter_places must be 'both' or 'mlp'"):
        peer("adapter", adapter_places="attention")
    with pytest.raises(ConfigError, match="lora_targets belongs to method='lora'"):
        peer("full", lora_targets="attention")
    half = load_backbone(tiny_vit(), dtype="bfloat16", device="cpu")
    with pytest.raises(ConfigError, match="load it with dtype='float32'"):
        peer("linear", half)
    peer("linear").save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="pass backbone="):
        PeerModel.from_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="other weights"):
        PeerModel.from_pretrained(tmp_path, backbone=backbone(seed=3))


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"fpt-fast\[peers\]"):
        peer("lora")


def test_the_callers_backbone_stays_as_it_was() -> None:
    frozen = backbone()
    before = {name: p.clone() for name, p in frozen.vit.named_parameters()}
    for method in PEERS:
        step(peer(method, frozen), a_batch(), steps=1)
    after = dict(frozen.vit.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad for p in after.values())
