"""Quantising with less error: against quantize_4bit by what each of them minimises."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.ops import dequantize_4bit, quantize_4bit
from halfbyte.ops.quantize_fitted import fit_scales, nearest_codes, quantize_4bit_compensated, quantize_4bit_fitted
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.bnb_format import export_state_dict, load_quantized
from halfbyte.quant.codebooks import codebook_values, sorted_codes, thresholds

SPECS = [QuantSpec(), QuantSpec(double_quant=False), QuantSpec(codebook="fp4", block_size=128)]


def error_of(q: QuantizedTensor, weight: torch.Tensor, inputs: torch.Tensor | None = None) -> float:
    lacks = dequantize_4bit(q, dtype=torch.float32) - weight.float()
    return float((lacks if inputs is None else inputs @ lacks.T).square().sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(96, 256), (7, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fitted_scales_lose_less_in_the_same_format(
    spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    fitted, plain = quantize_4bit_fitted(weight, spec), quantize_4bit(weight, spec)
    assert error_of(fitted, weight) < 0.97 * error_of(plain, weight)
    assert [t.dtype for t in fitted.tensors()] == [t.dtype for t in plain.tensors()]
    assert [t.shape for t in fitted.tensors()] == [t.shape for t in plain.tensors()]
    again = load_quantized("layer", export_state_dict("layer", fitted))
    assert torch.equal(dequantize_4bit(again), dequantize_4bit(fitted))


def test_no_scale_near_the_fitted_one_is_much_better() -> None:
    blocks = torch.randn(200, 64)
    scale = fit_scales(blocks, "nf4")

    def loss(scale: torch.Tensor) -> torch.Tensor:
        values = codebook_values("nf4")[nearest_codes(blocks / scale[:, None], "nf4").int()]
        return (blocks - values * scale[:, None]).square().sum(1)

    best = torch.stack([loss(blocks.abs().amax(1) * share) for share in torch.linspace(0.6, 1.1, 200)]).amin(0)
    assert float(loss(scale).sum() / best.sum()) < 1.02


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_nearest_codes_are_those_of_the_thresholds(codebook: str) -> None:
    x = torch.cat([torch.linspace(-1.2, 1.2, 4001), thresholds(codebook), torch.tensor([torch.nan])])
    expected = sorted_codes(codebook)[torch.bucketize(x.nan_to_num(nan=0.0), thresholds(codebook))]
    assert torch.equal(nearest_codes(x, codebook), expected.to(torch.uint8))


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(block_size=128, double_quant=False)], ids=str)
def test_compensated_products_err_less(spec: QuantSpec) -> None:
    inputs = torch.randn(600, 256) @ torch.randn(256, 256)
    weight = torch.randn(80, 256)
    plain, compensated = quantize_4bit(weight, spec), quantize_4bit_compensated(weight, inputs.T @ inputs, spec)
    assert error_of(compensated, weight, inputs) < 0.5 * error_of(plain, weight, inputs)


def test_inputs_that_know_nothing_of_each_other_leave_nothing_to_compensate() -> None:
    weight = torch.randn(16, 128)
    compensated = quantize_4bit_compensated(weight, torch.eye(128), QuantSpec(double_quant=False))
    assert torch.equal(compensated.packed, quantize_4bit(weight, QuantSpec(double_quant=False)).packed)


def test_columns_that_no_input_reaches_are_rounded_by_themselves() -> None:
    inputs = torch.randn(300, 128)
    inputs[:, 5] = 0
    weight = torch.randn(16, 128)
    q = quantize_4bit_compensated(weight, inputs.T @ inputs, QuantSpec())
    lacks = (dequantize_4bit(q, dtype=torch.float32) - weight)[:, 5]
    assert lacks.abs().max() < 0.2 * weight.abs().amax()


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(4, 64)
    assert torch.equal(dequantize_4bit(quantize_4bit_fitted(weight, QuantSpec()), dtype=torch.float32), weight)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty weight"):
        quantize_4bit_fitted(torch.empty(0, 64), QuantSpec())
    with pytest.raises(ConfigError, match="whole blocks of 64"):
        quantize_4bit_compensated(torch.randn(4, 96), torch.eye(96), QuantSpec())
