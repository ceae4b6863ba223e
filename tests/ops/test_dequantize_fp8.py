"""dequantize_fp8 against the weight in fp32; the kernels on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.dequantize_fp8 import dequantize_fp8, row_scales
from halfbyte.ops.e4m3 import FP8
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.quant import QuantSpec
from tests.ops.fp8_cases import check_dequantize

SHAPES = [(64, 128), (48, 80), (16, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_dequantize_fp8_is_the_weight_rounded_to_four_bits(shape: tuple[int, int], is_transposed: bool) -> None:
    q = quantize_4bit(torch.randn(shape) * torch.rand(shape[0], 1), QuantSpec())
    weight, scale = dequantize_4bit(q, dtype=torch.float32), row_scales(q)
    out = torch.empty(shape[::-1] if is_transposed else shape, dtype=FP8)
    assert dequantize_fp8(q, scale, out=out, is_transposed=is_transposed) is out
    values = (out.float().T if is_transposed else out.float()) * scale[:, None]
    assert ((values - weight).abs() <= torch.maximum(weight.abs() / 16, scale[:, None] * 2**-10)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_dequantize_fp8_kernels_on_a_gpu(codebook: str, double_quant: bool, block_size: int) -> None:
    spec = QuantSpec(codebook=codebook, block_size=block_size, double_quant=double_quant)
    for shape, spare in (((16, 64), 0), ((144, 192), 16), ((272, 960), 48), ((512, 4096), 0), ((256, 11008), 48)):
        check_dequantize(shape, spec, spare=spare, larger_scales=spare == 16, backend="triton", device="cuda")
