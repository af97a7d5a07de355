"""The authors' weights into a native model and back."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fpt_fast.compat import side_vit
from fpt_fast.compat.bridge import FineGrainedPromptTuning, FusionModule
from fpt_fast.compat.checkpoints import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    to_reference,
)
from fpt_fast.config import FptConfig, fpt, fpt_plus
from fpt_fast.records import FeatureBatch
from helpers import TINY_SPEC

OUTPUTS, PROMPTS, BATCH, KEPT = 5, 4, 2, 6
CHANGES = {"side_size": (16, 16), "side_reduction": 2, "num_prompts": PROMPTS}
CONFIGS = {"fpt_plus": fpt_plus(**CHANGES), "fpt": fpt(**CHANGES)}


def reference_model(config: FptConfig) -> FineGrainedPromptTuning:
    layers = len(config.resolve_layers(TINY_SPEC.depth))
    side = SimpleNamespace(
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=8,
        num_labels=OUTPUTS,
    )
    fusion = FusionModule(
        layers,
        48,
        24,
        3,
        PROMPTS,
        prompt_dim=48 if config.prompt_dim == "frozen" else 24,
        prompt_norm=config.prompt_norm,
        prompt_proj=config.prompt_proj,
    )
    model = FineGrainedPromptTuning(side_vit.ViTForImageClassification(side), fusion).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("method", CONFIGS)
def test_there_and_back(tmp_path: Path, method: str) -> None:
    theirs = reference_model(CONFIGS[method])
    torch.save(theirs.state_dict(), tmp_path / "best.pt")
    ours = load_checkpoint(tmp_path / "best.pt", config=CONFIGS[method], spec=TINY_SPEC)
    assert ours.num_outputs == OUTPUTS
    assert not ours.training

    layers = len(ours.layers)
    pixels, kv = torch.randn(BATCH, 3, 16, 16), torch.randn(BATCH, layers, 2, 3, KEPT, 16)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    batch = FeatureBatch(pixels, kv, None, labels, ("a", "b"))
    keys, values = kv[:, :, 0].transpose(0, 1), kv[:, :, 1].transpose(0, 1)
    torch.testing.assert_close(ours(batch), theirs(pixels, keys, values))

    save_checkpoint(ours, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    expected = theirs.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    reference_model(CONFIGS[method]).load_state_dict(back, strict=True)


def test_checkpoint_with_optimizer_state(tmp_path: Path) -> None:
    theirs = reference_model(CONFIGS["fpt"])
    content = {"epoch": 3, "state_dict": theirs.state_dict(), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "checkpoint.pt")
    ours = load_checkpoint(tmp_path / "checkpoint.pt", config=CONFIGS["fpt"], spec=TINY_SPEC)
    assert torch.equal(ours.side.head.weight, theirs.side_encoder.classifier.weight)


def test_optimizer_state_resumes_in_the_compat_model() -> None:
    """Their ``resume`` loads model and optimiser by position."""
    config = CONFIGS["fpt_plus"]
    theirs = reference_model(config)
    optimizer = torch.optim.AdamW(theirs.parameters())
    for parameter in theirs.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    again = reference_model(config)
    again.load_state_dict(theirs.state_dict())
    resumed = torch.optim.AdamW(again.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for one, other in zip(theirs.parameters(), again.parameters(), strict=True):
        assert torch.equal(resumed.state[other]["exp_avg"], optimizer.state[one]["exp_avg"])


def refused(tmp_path: Path, weights: object, method: str = "fpt") -> str:
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "w.pt", config=CONFIGS[method], spec=TINY_SPEC)
    return str(caught.value)


def weights(method: str = "fpt") -> dict[str, Tensor]:
    return dict(reference_model(CONFIGS[method]).state_dict())


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    tensors = weights()
    tensors["module.more"] = tensors.pop("fusion_module.out_proj.bias")
    key = "side_encoder.vit.encoder.layer.1.attention.attention.key.weight"
    tensors[key] = torch.zeros(3, 3)
    message = refused(tmp_path, tensors)
    assert "missing fusion_module.out_proj.bias" in message
    assert "unexpected module.more" in message
    assert f"{key} must be (24, 24), got (3, 3)" in message


def test_weights_of_the_other_method(tmp_path: Path) -> None:
    message = refused(tmp_path, weights("fpt_plus"), "fpt")
    assert "missing fusion_module.prompt_proj.weight" in message
    assert "unexpected fusion_module.layer_norm.weight" in message


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": 3}, torch.zeros(2)])
def test_other_content(tmp_path: Path, content: object) -> None:
    assert "must hold tensors by name" in refused(tmp_path, content)


def test_weights_of_something_else(tmp_path: Path) -> None:
    assert "not the authors' model" in refused(tmp_path, {"weight": torch.zeros(2)})


class Hostile:
    """What a pickle may do when it is opened."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('hacked', 'w').close()",)


def test_files_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("code.pt", pickle.dumps(Hostile(), protocol=2)),
        ("noise.pt", b"\x00" * 50),
        ("empty.pt", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not a file of plain tensors"):
            load_checkpoint(tmp_path / name, config=CONFIGS["fpt"], spec=TINY_SPEC)
    torch.save({"x": Hostile()}, tmp_path / "code2.pt")
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        load_checkpoint(tmp_path / "code2.pt", config=CONFIGS["fpt"], spec=TINY_SPEC)
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.pt", config=CONFIGS["fpt"], spec=TINY_SPEC)


def test_converted_weights_do_not_share_memory(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "w.pt")
    model = load_checkpoint(tmp_path / "w.pt", config=CONFIGS["fpt"], spec=TINY_SPEC)
    converted = to_reference(model)
    converted["side_encoder.classifier.bias"].fill_(9)
    assert not bool((model.side.head.bias == 9).any())
