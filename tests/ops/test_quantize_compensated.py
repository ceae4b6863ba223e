"""Quantising with regard to inputs: against quantize_4bit, by what the products lose."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops import dequantize_4bit, quantize_4bit
from halfbyte.ops.quantize_compensated import DAMPING, nearest_codes, quantize_4bit_compensated
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.bnb_format import export_state_dict, load_quantized
from halfbyte.quant.codebooks import sorted_codes, thresholds


def error_of(q: QuantizedTensor, weight: torch.Tensor, inputs: torch.Tensor | None = None) -> float:
    lacks = dequantize_4bit(q, dtype=torch.float32) - weight.float()
    return float((lacks if inputs is None else inputs @ lacks.T).square().sum())


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_nearest_codes_are_those_of_the_thresholds(codebook: str) -> None:
    x = torch.cat([torch.linspace(-1.2, 1.2, 4001), thresholds(codebook), torch.tensor([torch.nan])])
    expected = sorted_codes(codebook)[torch.bucketize(x.nan_to_num(nan=0.0), thresholds(codebook))]
    assert torch.equal(nearest_codes(x, codebook), expected.to(torch.uint8))


@pytest.mark.parametrize("width", [256, 96, 75])
@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec(block_size=128, double_quant=False), QuantSpec(codebook="fp4")], ids=str
)
def test_compensated_products_err_as_much_less_as_theory_says(spec: QuantSpec, width: int) -> None:
    inputs = torch.randn(600, width) @ torch.randn(width, width)
    weight = torch.randn(81, width)
    plain, compensated = quantize_4bit(weight, spec), quantize_4bit_compensated(weight, inputs.T @ inputs, spec)
    gained = error_of(compensated, weight, inputs) / error_of(plain, weight, inputs)
    # With rounding errors of one variance everywhere, plain rounding loses the trace of H times it, and compensated
    # rounding the sum of 1 / U_jj^2; some thousand roundings give either within a few hundredths.
    hessian = (inputs.T @ inputs).double()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    expected = float(factor.diagonal().pow(-2).sum() / hessian.trace())
    assert 0.9 * expected < gained < 1.1 * expected


def test_inputs_that_know_nothing_of_each_other_leave_nothing_to_compensate() -> None:
    spec = QuantSpec(double_quant=False)
    for width in (128, 33):
        weight = torch.randn(17, width)
        assert torch.equal(
            dequantize_4bit(quantize_4bit_compensated(weight, torch.eye(width), spec)),
            dequantize_4bit(quantize_4bit(weight, spec)),
        )


def test_columns_that_no_input_reaches_are_rounded_by_themselves() -> None:
    inputs = torch.randn(300, 128)
    inputs[:, 5] = 0
    weight = torch.randn(16, 128)
    q = quantize_4bit_compensated(weight, inputs.T @ inputs, QuantSpec())
    lacks = (dequantize_4bit(q, dtype=torch.float32) - weight)[:, 5]
    assert lacks.abs().max() < 0.2 * weight.abs().amax()


def test_what_is_written_reads_like_any_other() -> None:
    weight = torch.randn(16, 128)
    q, plain = quantize_4bit_compensated(weight, torch.eye(128), QuantSpec()), quantize_4bit(weight, QuantSpec())
    assert [(t.dtype, t.shape) for t in q.tensors()] == [(t.dtype, t.shape) for t in plain.tensors()]
    again = load_quantized("layer", export_state_dict("layer", q))
    assert torch.equal(dequantize_4bit(again), dequantize_4bit(q))


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(4, 64)
    q = quantize_4bit_compensated(weight, torch.eye(64), QuantSpec())
    assert torch.equal(dequantize_4bit(q, dtype=torch.float32), weight)
