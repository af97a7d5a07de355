"""frozen_attention on a GPU: every implementation that runs there, against the oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast.backbone import load_backbone
from fpt_fast.ops import attention_with_scores, frozen_attention, implementation, reference
from fpt_fast.selection import select_features
from helpers import assert_within_budget, tiny_vit
from on_device import DTYPES, ON_GPU, REPEATS, by_head, many_images, peak_added

pytestmark = pytest.mark.gpu

LARGE_CASES = (
    FrozenCase("vit_b_512px", 2, 12, 1025, 64, 205),
    FrozenCase("vit_b_1024px", 1, 12, 4097, 64, 819),
    FrozenCase("width_128", 1, 3, 1025, 128, 205),
    FrozenCase("width_100", 2, 3, 577, 100, 115),
)
CASES = (*FROZEN_CASES, *LARGE_CASES) if ON_GPU else FROZEN_CASES[:3]
LAYER = LARGE_CASES[0] if ON_GPU else FROZEN_CASES[0]
IMPLEMENTATIONS = implementation.implementations("frozen_attention")
# Of f16 and heads of 64, all of these run on Ampere and newer; xformers may not be installed.
ON_CUDA = ("flash", "efficient", "cudnn", "triton") if ON_GPU else ("triton",)


def reasons(impl: str, *qkv: Tensor) -> list[str]:
    return implementation.unsupported_reasons("frozen_attention", impl, *qkv)


def one_of(part: int, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """Output (0) or log-sum-exp (1) of the oracle, in ``dtype`` or in that of the inputs."""
    return lambda *qkv: reference.frozen_attention(*(x.to(dtype or x.dtype) for x in qkv))[part]


def assert_budget(got: tuple[Tensor, Tensor], *qkv: Tensor) -> None:
    """Head by head, so that one map in fp64 exists at a time."""
    for part, shape in ((0, qkv[0].shape), (1, qkv[0].shape[:3])):
        wide, plain = (
            torch.stack(
                [
                    one_of(part, dtype)(*(x[image : image + 1, head : head + 1] for x in qkv))
                    for image in range(shape[0])
                    for head in range(shape[1])
                ]
            ).view(shape)
            for dtype in (torch.float64, None)
        )
        assert_within_budget(got[part], wide, plain)


@pytest.mark.parametrize("impl", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget_and_repeats(
    case: FrozenCase, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    qkv = tuple(tensor.to(device) for tensor in case.qkv(dtype))
    if impl != "auto" and reasons(impl, *qkv):
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot run frozen_attention here"):
            frozen_attention(*qkv, impl=impl)
        return
    out, lse = frozen_attention(*qkv, impl=impl)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    assert_budget((out, lse), *qkv)
    for _ in range(REPEATS):
        again = frozen_attention(*qkv, impl=impl)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_what_runs_here(device: torch.device) -> None:
    """Nothing above is left out in silence."""
    q = torch.zeros(1, 2, 37, 64, dtype=torch.float16, device=device)
    assert [name for name in ON_CUDA if reasons(name, q, q, q)] == []
    has_native = not implementation.unsupported_reasons("frozen_attention", "native", q, q, q)
    expected = "flash" if ON_GPU else "native" if has_native else "cpu"
    assert implementation.resolve("frozen_attention", "auto", (q, q, q)).name == expected


@pytest.mark.parametrize("scale", [1e-3, 5.0, 20.0])
@pytest.mark.parametrize("impl", ON_CUDA)
def test_flat_and_peaked_attention(impl: str, scale: float, device: torch.device) -> None:
    q, k, v = (tensor.to(device) for tensor in FROZEN_CASES[3].qkv(torch.float16))
    q, k = q * scale, k * scale
    assert_budget(frozen_attention(q, k, v, impl=impl), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_from_the_lse_of_the_attention(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (tensor.to(device) for tensor in LAYER.qkv(dtype))
    _, scores, lse = attention_with_scores(q, k, v)
    assert scores is not None and lse is not None
    oracle = by_head(lambda q, k: reference.token_scores(q.double(), k.double()), q, k)
    assert_within_budget(scores, oracle, by_head(reference.token_scores, q, k))


@pytest.mark.parametrize("impl", ON_CUDA)
def test_memory_is_that_of_the_result_and_little_more(impl: str, device: torch.device) -> None:
    q, k, v = (tensor.to(device) for tensor in LAYER.qkv(torch.float16))
    results = q.nbytes + 4 * q[..., 0].numel()
    assert peak_added(lambda: frozen_attention(q, k, v, impl=impl)) <= results + (16 << 20)


def test_more_than_31_bits_of_elements(device: torch.device) -> None:
    """Heads of the last image, in a packed projection that a 32-bit offset cannot reach."""
    tokens, heads, width = (16385, 12, 64) if ON_GPU else (37, 2, 8)
    images = many_images(tokens * 3 * heads * width, 2)
    packed = torch.empty((images, tokens, 3, heads, width), dtype=torch.float16, device=device)
    packed[: images - 1] = 0
    packed[-1].normal_()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out, lse = frozen_attention(q, k, v, impl="triton")
    alone = frozen_attention(*(x[-1:].contiguous() for x in (q, k, v)), impl="triton")
    assert torch.equal(out[-1:], alone[0]) and torch.equal(lse[-1:], alone[1])


@pytest.mark.parametrize("attention", ON_CUDA)
def test_the_frozen_pass_through_any_attention(attention: str, device: torch.device) -> None:
    model, pixels = tiny_vit(), torch.randn(2, 3, 64, 48)
    wanted = {"layers": (1, 3), "token_ratio": 0.3, "importance": "global"}
    common = []
    for name in ("auto", attention):
        backbone = load_backbone(model, dtype="float16", device=str(device), attention=name)  # type: ignore[arg-type]
        common.append(select_features(backbone, pixels, **wanted).index)  # type: ignore[arg-type]
    same = (common[0][..., None] == common[1][..., None, :]).any(-1).float().mean()
    assert float(same) >= 0.9
