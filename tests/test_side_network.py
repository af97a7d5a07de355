"""The side network against a plain transformer that computes everything, and its checks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.side_network import SideNetwork

WIDTH, HEADS, LAYERS, OUTPUTS, PROMPTS, BATCH = 12, 3, 3, 4, 5, 2
PATCH, SIZE = (2, 4), (6, 8)


def network() -> SideNetwork:
    side = SideNetwork(WIDTH, HEADS, LAYERS, PATCH, SIZE, OUTPUTS)
    # The published start is so small that wrong attention would hardly show.
    for parameter in side.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return side.double()


def inputs() -> tuple[Tensor, Tensor]:
    pixels = torch.randn(BATCH, 3, *SIZE, dtype=torch.float64)
    states = torch.randn(LAYERS, BATCH, PROMPTS, WIDTH, dtype=torch.float64)
    return pixels, states.requires_grad_()


def plain(side: SideNetwork, pixels: Tensor, states: Tensor | None) -> Tensor:
    """DESIGN.md section 2.6 word by word: nothing left out, prompts through every step."""
    kernel = side.patch_embed.weight.view(WIDTH, 3, *PATCH)
    patches = functional.conv2d(pixels, kernel, side.patch_embed.bias, stride=PATCH)
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat((side.cls_token.expand(len(pixels), -1, -1), tokens), 1) + side.positions
    for i, layer in enumerate(side.layers):
        length = tokens.shape[1]
        x = tokens if states is None else torch.cat((tokens, states[i]), dim=1)
        n = functional.layer_norm(x, (WIDTH,), layer.norm1.weight, layer.norm1.bias, 1e-12)
        q, k, v = (
            (n @ w.T + b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
        )
        probabilities = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + layer.proj((probabilities @ v).transpose(1, 2).flatten(2))
        n = functional.layer_norm(x, (WIDTH,), layer.norm2.weight, layer.norm2.bias, 1e-12)
        hidden = layer.fc1(n)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + layer.fc2(hidden)
        tokens = x[:, :length]
    n = functional.layer_norm(tokens, (WIDTH,), side.norm.weight, side.norm.bias, 1e-12)
    return side.head(n[:, 0])


@pytest.mark.parametrize("fused", [True, False])
def test_formula_and_gradients(fused: bool) -> None:
    side = network()
    pixels, states = inputs()
    given = states if fused else None
    out, expected = side(pixels, given), plain(side, pixels, given)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(out)
    leaves = [*side.parameters(), states] if fused else list(side.parameters())
    got = torch.autograd.grad((out * weight).sum(), leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_the_head_is_not_rounded_where_products_are_in_bf16() -> None:
    torch.manual_seed(0)
    side = network().float()
    normed: list[Tensor] = []
    side.norm.register_forward_hook(lambda _module, _args, output: normed.append(output))
    pixels, states = (x.detach().float() for x in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        logits = side(pixels, states)
    assert logits.dtype == torch.float32
    expected = functional.linear(normed[0].float(), side.head.weight, side.head.bias)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_published_start() -> None:
    torch.manual_seed(3)
    side = SideNetwork(96, 12, 2, 16, 128, 5)
    assert side.cls_token.abs().max() < 0.2
    for weight in (side.positions, side.patch_embed.weight, side.layers[0].fc1.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    for name, parameter in side.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
    assert {m.eps for m in side.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}


def test_sizes_need_not_be_square() -> None:
    side = SideNetwork(WIDTH, HEADS, 1, 4, (8, 16), OUTPUTS)
    assert side.positions.shape == (1, 9, WIDTH)
    assert side(torch.zeros(1, 3, 8, 16), None).shape == (1, OUTPUTS)
    with pytest.raises(ValueError, match="pixels must be"):
        side(torch.zeros(1, 3, 16, 8), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide the side width"),
        ({"image_size": (7, 8)}, "image_size must be a multiple"),
        ({"num_outputs": 0}, "at least 1"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {
        "width": WIDTH,
        "num_heads": HEADS,
        "num_layers": LAYERS,
        "patch_size": PATCH,
        "image_size": SIZE,
        "num_outputs": OUTPUTS,
    }
    with pytest.raises(ValueError, match=message):
        SideNetwork(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape",
    [
        (LAYERS - 1, BATCH, PROMPTS, WIDTH),
        (LAYERS, BATCH + 1, PROMPTS, WIDTH),
        (LAYERS, BATCH, PROMPTS, WIDTH + 1),
        (LAYERS, BATCH, WIDTH),
    ],
)
def test_states_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="states must be"):
        network()(inputs()[0], torch.zeros(shape, dtype=torch.float64))
