"""lora_linear against plain torch in fp64 on the same 4-bit weights and the same dropout."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import halfbyte.ops.lora_linear as lora_module
from halfbyte.ops.dropout import apply_dropout, draw_dropout
from halfbyte.ops.lora_linear import LoraOptions, lora_linear, lora_linear_reference
from halfbyte.ops.workspace import Workspace
from tests.ops.adapter_cases import DTYPES, SHAPES, Case, held_by_graph, make_case, saved_tensors
from tests.oracles import assert_close

DROPOUT = LoraOptions(scaling=2.0, dropout=0.3)
PLAIN = LoraOptions(scaling=0.7)


def run(case: Case, options: LoraOptions, *, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return lora_linear(case.x, case.q, case.bias, case.lora_A, case.lora_B, options=options, workspace=case.workspace)


def keep_of(case: Case, options: LoraOptions, *, seed: int = 5) -> torch.Tensor | None:
    """Return the dropout that `run` draws with this seed, True where kept."""
    if not options.dropout:
        return None
    torch.manual_seed(seed)
    x = case.x.detach()
    dropped = draw_dropout(x, probability=options.dropout)
    return apply_dropout(torch.ones_like(x), dropped, out=torch.empty_like(x)).bool()


def check_against_fp64(case: Case, options: LoraOptions) -> None:
    y = run(case, options)
    y.backward(case.grad_y)
    x, lora_A, lora_B, bias = case.doubled()
    expected = lora_linear_reference(x, case.q, bias, lora_A, lora_B, options=options, keep=keep_of(case, options))
    expected.backward(case.grad_y.double())
    dtype, tokens, (out_features, in_features) = case.x.dtype, len(case.x), case.q.shape
    assert y.dtype == case.x.grad.dtype == dtype
    assert case.lora_A.grad.dtype == case.lora_B.grad.dtype == torch.float32
    # Rounded: the weights, the adapter's inner product, the base's result, the sum.
    assert_close("y", expected, y, dtype=dtype, roundings=4, reduction_length=in_features)
    assert_close("grad_x", x.grad, case.x.grad, dtype=dtype, roundings=4, reduction_length=out_features)
    # Rounded: the other weight, the inner product, the result.
    assert_close("grad_A", lora_A.grad, case.lora_A.grad, dtype=dtype, roundings=3, reduction_length=tokens)
    assert_close("grad_B", lora_B.grad, case.lora_B.grad, dtype=dtype, roundings=3, reduction_length=tokens)
    assert_close("grad_bias", bias.grad, case.bias.grad, dtype=dtype, roundings=1, reduction_length=tokens)


@pytest.mark.parametrize("options", [PLAIN, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), SHAPES)
def test_lora_linear_matches_fp64(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype, options: LoraOptions
) -> None:
    check_against_fp64(make_case(tokens, in_features, out_features, dtype=dtype), options)


def test_lora_linear_matches_fp64_in_fp16() -> None:
    check_against_fp64(make_case(3, 64, 16, dtype=torch.float16), DROPOUT)


@pytest.mark.parametrize("rank", [1, 63])
def test_lora_linear_matches_fp64_at_odd_ranks(rank: int) -> None:
    check_against_fp64(make_case(17, 64, 48, dtype=torch.float32, rank=rank), DROPOUT)


@pytest.mark.parametrize("options", [PLAIN, DROPOUT], ids=["plain", "dropout"])
def test_lora_linear_passes_gradcheck(options: LoraOptions) -> None:
    workspace, weight = Workspace(), torch.randn(5, 7, dtype=torch.float64)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 7), (2, 7), (5, 2), (5,))
    ]

    def call(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return lora_linear(x, weight, bias, lora_A, lora_B, options=options, workspace=workspace)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_lora_linear_works_beside_a_plain_weight(stored: torch.dtype) -> None:
    case = make_case(9, 64, 48, dtype=torch.float32)
    weight = torch.randn(48, 64).to(stored)
    arguments = (case.x, weight, case.bias, case.lora_A, case.lora_B)
    y = lora_linear(*arguments, options=PLAIN, workspace=case.workspace)
    expected = lora_linear_reference(*(t.double() for t in arguments), options=PLAIN)
    assert_close("y", expected, y, dtype=torch.float32, roundings=4, reduction_length=64)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_lora_linear_does_not_round_a_small_adapter_away(device: str) -> None:
    # As after the first steps of a training: the adapter's part is far below half a unit in the last place.
    generator = torch.Generator().manual_seed(0)
    x, weight, grad_y = (
        torch.randn(shape, generator=generator).bfloat16().to(device) for shape in ((512, 256), (384, 256), (512, 384))
    )
    lora_A = torch.randn(16, 256, generator=generator).to(device) / 16
    lora_B = torch.randn(384, 16, generator=generator).to(device) * 2e-4
    x.requires_grad_()

    def run_with(lora_B: torch.Tensor, lora_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = lora_linear(x, weight / 16, None, lora_A, lora_B, options=PLAIN, workspace=Workspace())
        return y.detach().double(), torch.autograd.grad(y, x, grad_y)[0].double()

    y, grad_x = run_with(lora_B, lora_A)
    base_y, base_grad_x = run_with(torch.zeros_like(lora_B), lora_A)
    both = PLAIN.scaling * lora_B.double() @ lora_A.double()
    for added, exact in ((y - base_y, x.double() @ both.T), (grad_x - base_grad_x, grad_y.double() @ both)):
        share_kept = ((added * exact).sum() / (exact * exact).sum()).item()
        assert share_kept == pytest.approx(1, abs=0.1)


def test_lora_linear_with_its_adapter_beside_the_weight_gives_the_same() -> None:
    # What a GPU does in 16 bits.
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(9, 64, 48, dtype=dtype)
        frozen = lora_module.Frozen(weight=case.q, options=PLAIN, workspace=case.workspace)
        x, lora_A, lora_B, bias = case.doubled()
        with torch.no_grad():
            y = frozen.riding_product(case.x, case.x @ case.lora_A.to(dtype).T, case.lora_B, case.bias)
        expected = lora_linear_reference(x, case.q, bias, lora_A, lora_B, options=PLAIN)
        assert_close("y", expected, y, dtype=dtype, roundings=4, reduction_length=64)


def test_lora_linear_saves_no_weight() -> None:
    case = make_case(8, 96, 48, dtype=torch.bfloat16)
    outputs: list[torch.Tensor] = []
    saved = saved_tensors(lambda: outputs.append(run(case, DROPOUT)))
    floats = {(tuple(t.shape), t.dtype) for t in saved if t.is_floating_point()}
    masters = {((8, 96), torch.float32), ((48, 8), torch.float32)}
    assert floats == masters | {((8, 96), torch.bfloat16), ((8, 8), torch.bfloat16)}
    (positions,) = [t for t in saved if not t.is_floating_point()]
    assert positions.dtype == torch.int32
    assert positions.numel() < 0.6 * case.x.numel()
    assert {id(t) for t in held_by_graph(outputs[0])} == {id(t) for t in case.q.tensors()}


def test_lora_linear_backward_does_not_rely_on_the_buffers() -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    y = run(case, DROPOUT)
    inputs = [case.x, case.lora_A, case.lora_B]
    expected = torch.autograd.grad(y, inputs, case.grad_y, retain_graph=True)
    for key, shape in (("expanded_weight", (48, 64)), ("dropped_input", (8, 64))):
        case.workspace.take(key, shape, dtype=torch.float32, device=y.device).fill_(torch.nan)
    actual = torch.autograd.grad(y, inputs, case.grad_y)
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


def test_lora_linear_gives_only_the_gradients_asked_for() -> None:
    for wanted in ("x", "lora_A", "lora_B"):
        case = make_case(8, 64, 48, dtype=torch.float32)
        expected = make_case(8, 64, 48, dtype=torch.float32)
        torch.manual_seed(0)
        names = ("x", "lora_A", "lora_B", "bias")
        for name in names:
            getattr(expected, name).data.copy_(getattr(case, name).data)
            getattr(case, name).requires_grad_(name == wanted)
        expected.q = case.q
        run(case, DROPOUT).backward(case.grad_y)
        run(expected, DROPOUT).backward(case.grad_y)
        assert getattr(case, wanted).grad.equal(getattr(expected, wanted).grad)
        assert all(getattr(case, name).grad is None for name in names if name != wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_lora_linear_repeats_its_dropout_under_checkpointing(use_reentrant: bool) -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    inputs = [case.x, case.lora_A, case.lora_B]

    def call(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        y = lora_linear(x, case.q, None, lora_A, lora_B, options=DROPOUT, workspace=case.workspace)
        return torch.tanh(y)

    torch.manual_seed(1)
    y = call(*inputs)
    y.backward(case.grad_y)
    expected = [t.grad.clone() for t in inputs]
    for tensor in inputs:
        tensor.grad = None
    torch.manual_seed(1)
    again = checkpoint(call, *inputs, use_reentrant=use_reentrant)
    assert again.equal(y)
    torch.manual_seed(99)
    again.backward(case.grad_y)
    assert all(t.grad.equal(e) for t, e in zip(inputs, expected, strict=True))


def test_lora_linear_takes_any_leading_dimensions_and_strides() -> None:
    case = make_case(24, 64, 32, dtype=torch.float32)
    flat = run(case, DROPOUT)
    flat.backward(case.grad_y)
    grad_x, grad_A = case.x.grad.clone(), case.lora_A.grad.clone()
    case.x = case.x.detach().view(2, 12, 64).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    case.lora_A.grad = None
    y = run(case, DROPOUT)
    assert y.shape == (2, 12, 32)
    assert y.view(24, 32).equal(flat)
    y.backward(case.grad_y.view(2, 12, 32).transpose(0, 1).contiguous().transpose(0, 1))
    assert case.x.grad.reshape(24, 64).equal(grad_x)
    assert case.lora_A.grad.equal(grad_A)


def test_lora_linear_without_grad_equals_with() -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    with torch.no_grad():
        y = run(case, DROPOUT)
    assert y.grad_fn is None
    assert y.equal(run(case, DROPOUT))


def test_lora_linear_follows_autocast() -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(case, DROPOUT)
    assert y.dtype == torch.bfloat16
    y.backward(case.grad_y.bfloat16())
    assert case.x.grad.dtype == case.lora_A.grad.dtype == torch.float32
    case.x = case.x.detach().bfloat16()
    assert run(case, DROPOUT).equal(y)


def test_lora_linear_notices_an_adapter_changed_in_between() -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    y = run(case, PLAIN)
    with torch.no_grad():
        case.lora_A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.grad_y)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [PLAIN, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), SHAPES)
def test_lora_linear_matches_fp64_on_a_gpu(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype, options: LoraOptions
) -> None:
    check_against_fp64(make_case(tokens, in_features, out_features, dtype=dtype, device="cuda"), options)
