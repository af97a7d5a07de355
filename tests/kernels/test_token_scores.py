"""token_scores in Triton's interpreter: budgets, odd shapes, strides, extreme and broken inputs.

``tests/ops/test_token_scores.py`` runs its own cases through ``impl="triton"`` too.
"""

from pathlib import Path

import pytest
import torch
from huggingface_folder import golden_folder
from torch import Tensor

from benchmarks.cases import FrozenCase
from fpt_fast import ops
from fpt_fast.backbone import load_backbone
from fpt_fast.ops import implementation, reference
from fpt_fast.records import Importance
from fpt_fast.selection import keep_count
from fptkernels import launch_table
from fptkernels.token_scores import token_scores
from helpers import Golden, assert_within_budget, relative_error

IMPORTANCES: tuple[Importance, ...] = ("global", "class_token")
DTYPES = (torch.float32, torch.float16)
# Tails of one row, whole blocks only, less than a block; widths that need padding and that do not.
SHAPES = (
    (1, 2, 65, 16),
    (2, 1, 64, 3),
    (1, 1, 33, 32),
    (1, 2, 5, 17),
    (1, 1, 2, 1),
    (1, 1, 129, 8),
)


def qk(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = shape
    q, k, _ = FrozenCase("", batch, heads, tokens, width, 1).qkv(dtype)
    return q, k


def assert_budget(q: Tensor, k: Tensor, scores: Tensor, importance: str) -> None:
    oracle = reference.token_scores(q.double(), k.double(), importance)
    assert_within_budget(scores, oracle, reference.token_scores(q, k, importance))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_budget(
    shape: tuple[int, int, int, int], dtype: torch.dtype, importance: Importance
) -> None:
    q, k = qk(shape, dtype)
    scores = token_scores(q, k, importance, None)
    assert scores.dtype == torch.float32 and scores.shape == q.shape[:3]
    assert_budget(q, k, scores, importance)
    assert torch.equal(scores, ops.token_scores(q, k, importance=importance, impl="triton"))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 0.1, 10.0])
def test_budget_of_tiny_and_of_huge_logits(
    scale: float, dtype: torch.dtype, importance: Importance
) -> None:
    q, k = (x * scale for x in qk((1, 2, 37, 10), dtype))
    assert_budget(q, k, token_scores(q, k, importance, None), importance)


def test_logits_beyond_f16_stay_finite() -> None:
    q = torch.full((1, 1, 3, 16), 200.0, dtype=torch.float16)
    torch.testing.assert_close(token_scores(q, q, "global", None), torch.full((1, 1, 3), 1 / 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_given_lse_takes_the_place_of_the_first_pass(dtype: torch.dtype) -> None:
    q, k = qk((2, 2, 65, 12), dtype)
    logits = q.double() @ k.double().mT * 12**-0.5
    wide = torch.stack([logits.logsumexp(-1).float()] * 2, dim=-1)
    lse = wide[..., 0]
    assert not lse.is_contiguous()
    oracle = (logits - lse.double().unsqueeze(-1)).exp().mean(-2)
    plain = (q @ k.mT * 12**-0.5 - lse.unsqueeze(-1)).exp().mean(-2)
    scores = token_scores(q, k, "global", lse)
    assert_within_budget(scores, oracle, plain)
    # It is used, not computed anew: weights of an lse that is log 2 higher are half as large.
    halved = token_scores(q, k, "global", lse + torch.tensor(2.0).log())
    torch.testing.assert_close(halved * 2, scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_given_lse_of_hundreds(dtype: torch.dtype) -> None:
    q, k = (x * 10 for x in qk((1, 2, 81, 10), dtype))

    def plain(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return (q @ k.mT * 10**-0.5 - lse.unsqueeze(-1)).exp().mean(-2)

    lse = (q.double() @ k.double().mT * 10**-0.5).logsumexp(-1).float()
    assert float(lse.max()) > 400
    oracle = plain(q.double(), k.double(), lse.double())
    assert_within_budget(token_scores(q, k, "global", lse), oracle, plain(q, k, lse))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 36, 300])
def test_a_bad_key_spoils_the_class_token_of_its_own_head(token: int, bad: float) -> None:
    q, k = (x.contiguous().abs() for x in qk((2, 2, 301, 10), torch.float32))
    k[1, 0, token, 3] = bad
    scores = token_scores(q, k, "class_token", None)
    expected = reference.token_scores(q, k, "class_token")
    assert expected[1, 0].isnan().all() and int(expected.isnan().sum()) == 301
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0, equal_nan=True)


def test_the_class_token_gives_no_weight_to_logits_of_minus_inf() -> None:
    q, k = (x.contiguous().abs() for x in qk((1, 1, 301, 10), torch.float32))
    k[0, 0, 1:, 3] = -torch.inf
    scores = token_scores(q, k, "class_token", None)
    assert float(scores[0, 0, 0]) == 1 and float(scores[0, 0, 1:].abs().max()) == 0
    k[0, 0, 0, 3] = -torch.inf
    assert token_scores(q, k, "class_token", None).isnan().all()


def test_the_class_token_needs_no_lse() -> None:
    q, k = qk((1, 2, 37, 10), torch.float32)
    wrong = torch.full((1, 2, 37), 5.0)
    expected = token_scores(q, k, "class_token", None)
    assert torch.equal(token_scores(q, k, "class_token", wrong), expected)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_strides_and_reruns_change_no_bit(importance: Importance) -> None:
    q, k = qk((2, 2, 37, 10), torch.float16)
    assert not q.is_contiguous()
    first = token_scores(q, k, importance, None)
    reversed_axes = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k)]
    assert reversed_axes[0].stride(-1) != 1
    assert torch.equal(first, token_scores(q, k, importance, None))
    assert torch.equal(first, token_scores(q.contiguous(), k.contiguous(), importance, None))
    assert torch.equal(first, token_scores(reversed_axes[0], reversed_axes[1], importance, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 36, 64])
@pytest.mark.parametrize("in_q", [True, False])
def test_nan_and_inf_spoil_their_own_head_as_softmax_does(
    in_q: bool, token: int, bad: float
) -> None:
    q, k = (x.contiguous().abs() for x in qk((2, 2, 65, 10), torch.float32))
    (q if in_q else k)[1, 0, token, 3] = bad
    scores = token_scores(q, k, "global", None)
    expected = reference.token_scores(q, k)
    assert expected[1, 0].isnan().all() and int(expected.isnan().sum()) == 65
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("masked", [slice(0, 40), slice(64, 65)])
def test_logits_of_minus_inf_are_weights_of_zero(masked: slice) -> None:
    """Also where a whole block of keys has no finite logit."""
    q, k = (x.contiguous().abs() for x in qk((1, 1, 65, 10), torch.float32))
    k[0, 0, masked, 3] = -torch.inf
    scores = token_scores(q, k, "global", None)
    assert (scores[0, 0, masked] == 0).all()
    torch.testing.assert_close(scores, reference.token_scores(q, k), rtol=1e-5, atol=0)


def test_rows_of_minus_inf_are_nan_as_in_softmax() -> None:
    q, k = (x.contiguous().abs() for x in qk((1, 1, 37, 4), torch.float32))
    q[0, 0, 5, 2] = -torch.inf
    assert reference.token_scores(q, k).isnan().all()
    assert token_scores(q, k, "global", None).isnan().all()


def test_no_images_give_no_scores() -> None:
    q = torch.zeros(0, 3, 5, 8)
    assert token_scores(q, q, "global", None).shape == (0, 3, 5)


def test_kept_sets_of_the_golden_files(golden: Golden, tmp_path: Path) -> None:
    """The scores keep the tokens that the authors' code keeps, exactly, in every layer."""
    config = golden.config
    importance = config["token_importance"]
    folder = golden_folder(golden, tmp_path / golden.name)
    backbone = load_backbone(
        folder, dtype="float32", device="cpu", position_interpolation="bicubic_scale"
    )
    layers = range(backbone.spec.depth)
    for state in backbone.extract(golden["pixel_values"], layers, importance=importance):
        scores = ops.token_scores(state.q, state.k, importance=importance, impl="triton")
        assert relative_error(scores, golden["scores"][state.layer]) <= 1e-5
        keep = keep_count(config["token_ratio"], scores.shape[-1])
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]
        expected = golden["indices"][state.layer].sort(dim=-1).values
        assert torch.equal(order.sort(dim=-1).values, expected), f"layer {state.layer}"


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(importance: str, with_lse: bool) -> None:
    q, k = qk((2, 2, 17, 10), torch.float32)
    lse = (q @ k.mT / 10**0.5).logsumexp(-1) if with_lse else None
    args = (q, k, importance, lse, "triton")
    torch.library.opcheck(torch.ops.fpt.token_scores.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def score(q: Tensor, k: Tensor) -> Tensor:
        return ops.token_scores(q * 2, k, impl="triton") + 1

    torch.compiler.reset()
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (17, 33):
        q, k = qk((1, 2, tokens, 10), torch.float32)
        torch.testing.assert_close(compiled(q, k), score(q, k))


def test_what_the_kernel_does_not_take_is_said() -> None:
    q = torch.zeros(1, 1, 3, 129)
    reasons = implementation.unsupported_reasons("token_scores", "triton", q, q)
    assert reasons == ["it takes a head width of at most 128, got 129"]
    with pytest.raises(ValueError, match="impl='triton' cannot run token_scores here"):
        ops.token_scores(q, q, impl="triton")
    double = torch.zeros(1, 1, 3, 8).double()
    reasons = implementation.unsupported_reasons("token_scores", "triton", double, double)
    assert reasons == ["it has no float64 form"]


def test_without_the_interpreter_a_cpu_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match="it runs on cuda tensors, got tensors on cpu"):
        ops.token_scores(q, q, impl="triton")
    assert implementation.resolve("token_scores", "auto", (q, q)).name in ("native", "cpu")


def test_the_table_has_a_row_for_every_launch() -> None:
    for name in ("rows", "columns", "class_token"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for width in (1, 16, 17, 64, 80, 128):
                for architecture in launch_table.ARCHITECTURES:
                    padded = launch_table.pad_width(width)
                    assert (f"token_scores_{name}", dtype, padded, architecture) in (
                        launch_table.TABLE
                    )
