"""The Triton kernels of quantise and dequantise under Triton's interpreter, run in a process of its own.

The interpreter has to be asked for before triton is first imported. It computes on numpy arrays in host memory. Where
a GPU rounds fp32 to bf16 it cuts off, and it converts denormal numbers from and to bf16 wrongly; everything else is
what a GPU computes.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from halfbyte.kernels.dequantize_4bit import DequantizeLaunch
from halfbyte.kernels.quantize_4bit import QuantizeLaunch
from halfbyte.ops import dequantize_4bit, dequantize_4bit_reference, quantize_4bit
from halfbyte.ops.dequantize_4bit import dequantize_4bit_triton
from halfbyte.ops.quantize_4bit import _quantize_absmax_triton, quantize_4bit_triton, quantize_absmax_reference
from halfbyte.quant import QuantSpec
from halfbyte.quant.codebooks import thresholds
from halfbyte.quant.tensor import CODEBOOKS
from tests.ops.quantize_cases import (
    DTYPES,
    assert_same_bytes,
    assert_same_numbers,
    make_weight,
    reference_with_offset,
)

# numpy says aloud what a GPU does silently.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
SPECS = [
    QuantSpec(codebook=codebook, block_size=block_size, double_quant=double_quant)
    for codebook, (block_size, double_quant) in itertools.product(
        CODEBOOKS, ((32, True), (64, False), (64, True), (4096, True))
    )
]
SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.codebook}-{s.block_size}-{s.double_quant:d}")
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@SPEC
@DTYPE
def test_quantize_4bit_kernel_gives_the_reference_bytes(spec: QuantSpec, dtype: torch.dtype) -> None:
    searches = ("bins", "tree") if spec.codebook == "nf4" else ("tree",)
    for (seed, shape), search in itertools.product(enumerate([(7,), (65, 129), (128, 64)]), searches):
        weight = without_denormals(make_weight(shape, dtype, seed=seed), dtype)
        launch = QuantizeLaunch(search=search, elements_per_program=2048)
        q = quantize_4bit_triton(weight, spec, launch=launch)
        assert_same_bytes(reference_with_offset(weight, spec, q), q)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_quantize_4bit_kernel_decides_at_the_thresholds_as_the_reference(codebook: str) -> None:
    x = thresholds(codebook)
    near = torch.cat([x, x.nextafter(torch.full_like(x, 9.0)), x.nextafter(torch.full_like(x, -9.0)), torch.ones(19)])
    spec = QuantSpec(codebook=codebook)
    q = quantize_4bit(near, spec, backend="triton")
    assert_same_bytes(reference_with_offset(near, spec, q), q)


def test_quantize_4bit_kernel_does_not_hide_what_is_not_finite() -> None:
    for bad in (torch.nan, torch.inf):
        weight = torch.randn(256)
        weight[70] = bad
        absmax = quantize_4bit(weight, QuantSpec(double_quant=False), backend="triton").absmax
        assert absmax.isfinite().tolist() == [True, False, True, True]


def test_quantize_absmax_kernel_adds_up_any_number_of_sums() -> None:
    absmax, sums = torch.rand(700), torch.rand(9001)
    codes, scale, offset = _quantize_absmax_triton(absmax, sums)
    assert offset.item() == pytest.approx(sums.double().sum().item() / 700, rel=1e-7)
    expected_codes, expected_scale = quantize_absmax_reference(absmax, offset)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)


@SPEC
@DTYPE
@pytest.mark.parametrize("launch", [DequantizeLaunch(lookup=k, elements_per_program=2048) for k in ("codes", "pairs")])
def test_dequantize_4bit_kernel_equals_the_reference(
    spec: QuantSpec, dtype: torch.dtype, launch: DequantizeLaunch
) -> None:
    for seed, shape in enumerate([(7,), (65, 129), (70, 64)]):
        q = quantize_4bit(without_denormals(make_weight(shape, torch.float32, seed=seed), dtype), spec)
        expected = as_interpreted(dequantize_4bit_reference(q, dtype=torch.float32), dtype)
        out = torch.full(shape, torch.nan, dtype=dtype)
        assert_same_numbers(expected, dequantize_4bit_triton(q, out, launch=launch))
        if len(shape) == 2:
            buffer = torch.full((shape[0], shape[1] + 16), torch.nan, dtype=dtype)
            assert_same_numbers(expected, dequantize_4bit_triton(q, buffer[:, : shape[1]], launch=launch))
            assert buffer[:, shape[1] :].isnan().all()


def test_dequantize_4bit_kernel_with_rounded_pairs_is_near() -> None:
    q = quantize_4bit(torch.randn(33, 64), QuantSpec())
    out = dequantize_4bit_triton(q, torch.empty(33, 64, dtype=torch.float16), launch=DequantizeLaunch(lookup="rounded"))
    expected = dequantize_4bit_reference(q, dtype=torch.float16)
    assert (out.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max() <= 1


def test_dequantize_4bit_kernel_takes_every_byte() -> None:
    q = quantize_4bit(torch.randn(8, 64), QuantSpec())
    q = dataclasses.replace(q, packed=torch.arange(256, dtype=torch.uint8))
    assert_same_numbers(dequantize_4bit_reference(q), dequantize_4bit(q, backend="triton"))


def without_denormals(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.where(weight.abs() > 1e-36, 0) if dtype == torch.bfloat16 else weight


def as_interpreted(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    return exact.to(dtype)
