"""dora_linear against plain torch in fp64 on the same 4-bit weights and the same dropout, and against PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from halfbyte.ops import dequantize_4bit
from halfbyte.ops.dora_linear import dora_linear, dora_linear_reference, row_lengths
from halfbyte.ops.dropout import apply_dropout, draw_dropout
from halfbyte.ops.lora_linear import LoraOptions
from halfbyte.ops.workspace import Workspace
from tests.ops.adapter_cases import DTYPES, SHAPES, Case, make_case, saved_tensors
from tests.oracles import assert_close

DROPOUT = LoraOptions(scaling=2.0, dropout=0.3)
PLAIN = LoraOptions(scaling=0.7)


def magnitude_of(case: Case) -> torch.Tensor:
    """Return lengths of rows that are not those of the base."""
    return (torch.rand(case.q.shape[0], device=case.x.device) + 0.5).requires_grad_()


def run(case: Case, magnitude: torch.Tensor, options: LoraOptions, *, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    adapter = (case.lora_A, case.lora_B, magnitude)
    return dora_linear(case.x, case.q, case.bias, adapter, options=options, workspace=case.workspace)


def keep_of(case: Case, options: LoraOptions, *, seed: int = 5) -> torch.Tensor | None:
    """Return the dropout that `run` draws with this seed, True where kept."""
    if not options.dropout:
        return None
    torch.manual_seed(seed)
    x = case.x.detach()
    dropped = draw_dropout(x, probability=options.dropout)
    return apply_dropout(torch.ones_like(x), dropped, out=torch.empty_like(x)).bool()


def check_against_fp64(case: Case, options: LoraOptions) -> None:
    magnitude = magnitude_of(case)
    y = run(case, magnitude, options)
    y.backward(case.grad_y)
    x, lora_A, lora_B, bias = case.doubled()
    exact = magnitude.detach().double().requires_grad_()
    expected = dora_linear_reference(
        x, case.q, bias, (lora_A, lora_B, exact), options=options, keep=keep_of(case, options)
    )
    expected.backward(case.grad_y.double())
    dtype, tokens, (out_features, in_features) = case.x.dtype, len(case.x), case.q.shape
    assert y.dtype == case.x.grad.dtype == dtype
    assert case.lora_A.grad.dtype == case.lora_B.grad.dtype == magnitude.grad.dtype == torch.float32
    # As for lora_linear, and rounded besides: the gain, and what is multiplied with it.
    assert_close("y", expected, y, dtype=dtype, roundings=6, reduction_length=in_features)
    assert_close("grad_x", x.grad, case.x.grad, dtype=dtype, roundings=6, reduction_length=out_features)
    assert_close("grad_A", lora_A.grad, case.lora_A.grad, dtype=dtype, roundings=5, reduction_length=tokens)
    assert_close("grad_B", lora_B.grad, case.lora_B.grad, dtype=dtype, roundings=5, reduction_length=tokens)
    # Rounded: the weight, the inner product, v, v times the gradient of y.
    assert_close("grad_m", exact.grad, magnitude.grad, dtype=dtype, roundings=5, reduction_length=in_features)
    assert_close("grad_bias", bias.grad, case.bias.grad, dtype=dtype, roundings=1, reduction_length=tokens)


@pytest.mark.parametrize("options", [PLAIN, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), SHAPES)
def test_dora_linear_matches_fp64(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype, options: LoraOptions
) -> None:
    check_against_fp64(make_case(tokens, in_features, out_features, dtype=dtype), options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [PLAIN, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dora_linear_matches_fp64_on_a_gpu(dtype: torch.dtype, options: LoraOptions) -> None:
    check_against_fp64(make_case(63, 128, 96, dtype=dtype, device="cuda"), options)


@pytest.mark.parametrize("options", [PLAIN, DROPOUT], ids=["plain", "dropout"])
def test_dora_linear_has_the_gradients_of_its_reference_in_fp64(options: LoraOptions) -> None:
    # No gradcheck: that n is a constant is part of the definition, and finite differences do not know it.
    weight = torch.randn(5, 7, dtype=torch.float64)
    x, lora_A, lora_B, magnitude, bias = (
        torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((6, 7), (2, 7), (5, 2), (5,), (5,))
    )
    inputs = (x, lora_A, lora_B, magnitude, bias)
    torch.manual_seed(3)
    adapter = (lora_A, lora_B, magnitude)
    y = dora_linear(x, weight, bias, adapter, options=options, workspace=Workspace())
    torch.manual_seed(3)
    keep = None
    if options.dropout:
        dropped = draw_dropout(x.detach(), probability=options.dropout)
        keep = apply_dropout(torch.ones_like(x), dropped, out=torch.empty_like(x)).bool()
    expected = dora_linear_reference(x, weight, bias, adapter, options=options, keep=keep)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad_y = torch.randn_like(y)
    actual, exact = (torch.autograd.grad(out, inputs, grad_y) for out in (y, expected))
    # The bias's gradient is summed in fp32.
    for mine, theirs in zip(actual[:-1], exact[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[-1], exact[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [PLAIN, DROPOUT], ids=["plain", "dropout"])
def test_dora_linear_equals_peft(options: LoraOptions) -> None:
    case = make_case(9, 64, 48, dtype=torch.float32)
    magnitude = magnitude_of(case)
    y = run(case, magnitude, options)
    y.backward(case.grad_y)
    keep = keep_of(case, options)
    reference = nn.Sequential(nn.Linear(64, 48))
    reference[0].weight.data.copy_(dequantized(case))
    reference[0].bias.data.copy_(case.bias)
    config = peft.LoraConfig(
        r=8, lora_alpha=8 * options.scaling, target_modules=["0"], lora_dropout=options.dropout, use_dora=True
    )
    layer = peft.get_peft_model(reference, config).base_model.model[0]
    if keep is not None:
        layer.lora_dropout["default"] = Replay(keep, options.dropout)
    theirs = {
        "grad_A": (case.lora_A, layer.lora_A["default"].weight),
        "grad_B": (case.lora_B, layer.lora_B["default"].weight),
        "grad_m": (magnitude, layer.lora_magnitude_vector["default"].weight),
    }
    for ours, parameter in theirs.values():
        parameter.data.copy_(ours.detach())
    x = case.x.detach().clone().requires_grad_()
    expected = layer.train()(x)
    expected.backward(case.grad_y)
    pairs = {"y": (y, expected), "grad_x": (case.x.grad, x.grad)}
    pairs |= {name: (ours.grad, parameter.grad) for name, (ours, parameter) in theirs.items()}
    for name, (ours, other) in pairs.items():
        assert_close(name, other, ours, dtype=torch.float32, roundings=16, reduction_length=64)


def test_dora_linear_does_not_round_a_small_gain_away() -> None:
    # As after the first steps: the gain is nearer to 1 than bf16 can tell.
    x, weight = torch.randn(256, 128).bfloat16(), torch.randn(96, 128).bfloat16()
    lora_A, lora_B = torch.randn(4, 128), torch.zeros(96, 4)
    lengths = row_lengths(weight, lora_A, lora_B, scaling=1.0)
    small = 1e-3

    def run_with(gain: float) -> torch.Tensor:
        adapter = (lora_A, lora_B, lengths * gain)
        y = dora_linear(x, weight, None, adapter, options=PLAIN, workspace=Workspace())
        return y.double()

    exact = small * (x.double() @ weight.double().T)
    share_kept = (((run_with(1 + small) - run_with(1.0)) * exact).sum() / exact.square().sum()).item()
    assert share_kept == pytest.approx(1, abs=0.1)


def test_dora_linear_keeps_nothing_as_large_as_its_weight_or_output() -> None:
    case = make_case(40, 96, 48, dtype=torch.bfloat16)
    magnitude = magnitude_of(case)
    saved = saved_tensors(lambda: run(case, magnitude, DROPOUT))
    floats = {(tuple(t.shape), t.dtype) for t in saved if t.is_floating_point()}
    masters = {((8, 96), torch.float32), ((48, 8), torch.float32), ((48,), torch.float32)}
    assert floats == masters | {((40, 96), torch.bfloat16), ((40, 8), torch.bfloat16)}


def test_row_lengths_are_those_of_the_whole_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, lora_A, lora_B = torch.randn(37, 50), torch.randn(3, 50), torch.randn(37, 3)
    expected = (weight + 0.5 * lora_B @ lora_A).norm(dim=1)
    for elements in (1 << 18, 200):
        monkeypatch.setattr("halfbyte.ops.dora_linear.CPU_ELEMENTS", elements)
        actual = row_lengths(weight, lora_A, lora_B, scaling=0.5)
        assert_close(str(elements), expected, actual, dtype=torch.float32, roundings=4, reduction_length=50)


def test_dora_linear_of_a_row_of_zeros_is_zero() -> None:
    weight = torch.zeros(4, 8)
    adapter = (torch.randn(2, 8), torch.zeros(4, 2), torch.zeros(4).requires_grad_())
    y = dora_linear(torch.randn(3, 8), weight, None, adapter, options=PLAIN, workspace=Workspace())
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(adapter[2].grad).all()


class Replay(nn.Module):
    """Drops what another dropout has dropped."""

    def __init__(self, keep: torch.Tensor, probability: float) -> None:
        super().__init__()
        self.keep, self.probability = keep, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep / (1 - self.probability)


def dequantized(case: Case) -> torch.Tensor:
    return dequantize_4bit(case.q, dtype=torch.float32)
