"""linear_4bit against plain torch in fp64 on the same 4-bit weights."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.linear_4bit import linear_4bit, linear_4bit_reference
from tests.ops.adapter_cases import DTYPES, SHAPES, Case, held_by_graph, make_case, saved_tensors
from tests.oracles import assert_close


def check_against_fp64(case: Case, *, with_bias: bool) -> None:
    bias = case.bias if with_bias else None
    y = linear_4bit(case.x, case.q, bias, workspace=case.workspace)
    y.backward(case.grad_y)
    x, _, _, bias_64 = case.doubled()
    expected = linear_4bit_reference(x, case.q, bias_64 if with_bias else None)
    expected.backward(case.grad_y.double())
    dtype, (out_features, in_features) = case.x.dtype, case.q.shape
    assert y.dtype == dtype
    assert case.x.grad.dtype == dtype
    # Rounded to the dtype: the weight, the result.
    assert_close("y", expected, y, dtype=dtype, roundings=2, reduction_length=in_features)
    assert_close("grad_x", x.grad, case.x.grad, dtype=dtype, roundings=2, reduction_length=out_features)
    if with_bias:
        assert_close("grad_bias", bias_64.grad, case.bias.grad, dtype=dtype, reduction_length=len(case.x))


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), SHAPES)
def test_linear_4bit_matches_fp64(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype, with_bias: bool
) -> None:
    check_against_fp64(make_case(tokens, in_features, out_features, dtype=dtype), with_bias=with_bias)


def test_linear_4bit_matches_fp64_in_fp16() -> None:
    check_against_fp64(make_case(3, 64, 16, dtype=torch.float16), with_bias=True)


def test_linear_4bit_passes_gradcheck() -> None:
    case = make_case(1, 7, 5, dtype=torch.float32)
    x, bias = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inputs = (x.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, bias: linear_4bit(x, case.q, bias, workspace=case.workspace), inputs)


def test_linear_4bit_takes_any_leading_dimensions_and_strides() -> None:
    case = make_case(24, 64, 32, dtype=torch.float32)
    flat = linear_4bit(case.x, case.q, workspace=case.workspace)
    x = case.x.detach().view(2, 12, 64)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = linear_4bit(strided, case.q, workspace=case.workspace)
    assert y.shape == (2, 12, 32)
    assert y.view(24, 32).equal(flat)
    y.backward(case.grad_y.view(12, 2, 32).transpose(0, 1))
    assert strided.grad.shape == x.shape
    vector = linear_4bit(case.x[0], case.q, workspace=case.workspace)
    assert_close("vector", flat[0], vector, dtype=torch.float32, reduction_length=64)


def test_linear_4bit_saves_nothing() -> None:
    case = make_case(8, 96, 48, dtype=torch.bfloat16)
    outputs: list[torch.Tensor] = []
    saved = saved_tensors(lambda: outputs.append(linear_4bit(case.x, case.q, workspace=case.workspace)))
    assert saved == []
    held = held_by_graph(outputs[0])
    assert {id(t) for t in held} == {id(t) for t in case.q.tensors()}


def test_linear_4bit_backward_does_not_rely_on_the_buffer() -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    y = linear_4bit(case.x, case.q, workspace=case.workspace)
    expected = torch.autograd.grad(y, case.x, case.grad_y, retain_graph=True)[0]
    case.workspace.take("expanded_weight", (48, 64), dtype=torch.float32, device=y.device).fill_(torch.nan)
    assert torch.autograd.grad(y, case.x, case.grad_y)[0].equal(expected)


def test_linear_4bit_makes_no_graph_that_nobody_needs() -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    assert not linear_4bit(case.x.detach(), case.q, workspace=case.workspace).requires_grad
    with torch.no_grad():
        y = linear_4bit(case.x, case.q, workspace=case.workspace)
    assert y.grad_fn is None
    assert y.equal(linear_4bit(case.x, case.q, workspace=case.workspace))


def test_linear_4bit_follows_autocast() -> None:
    case = make_case(8, 64, 48, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_4bit(case.x, case.q, case.bias, workspace=case.workspace)
    assert y.dtype == torch.bfloat16
    y.backward(case.grad_y.bfloat16())
    assert case.x.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        expected = linear_4bit(case.x.bfloat16(), case.q, case.bias, workspace=case.workspace)
    assert y.equal(expected)


def test_linear_4bit_refuses_a_second_derivative() -> None:
    case = make_case(4, 64, 48, dtype=torch.float32)
    y = linear_4bit(case.x, case.q, workspace=case.workspace)
    (grad,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), SHAPES)
def test_linear_4bit_matches_fp64_on_a_gpu(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    check_against_fp64(make_case(tokens, in_features, out_features, dtype=dtype, device="cuda"), with_bias=True)
