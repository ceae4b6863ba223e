"""The 8-bit quantiser against bitsandbytes 0.50.2 on the CPU, code for code."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.ops.adamw8bit import BLOCK_SIZE, dequantize_8bit_reference, quantize_8bit_reference
from halfbyte.quant.codebooks import dynamic_map

BOTH = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
NUMELS = pytest.mark.parametrize("numel", [1, 255, 256, 257, 1000, 70_001])


@BOTH
@NUMELS
def test_quantize_8bit_equals_bitsandbytes(numel: int, signed: bool) -> None:
    x = torch.randn(numel) * torch.rand(numel) ** 8 * torch.rand(1) ** 12
    x = x if signed else x.abs()
    x[numel // 2 : numel // 2 + 2 * BLOCK_SIZE] = 0
    theirs, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed=signed), blocksize=BLOCK_SIZE)
    codes, absmax = quantize_8bit_reference(x, signed=signed)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, state.absmax)


@BOTH
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-38, 1e-20, 1e38])
def test_quantize_8bit_equals_bitsandbytes_on_tiny_and_huge_blocks(scale: float, signed: bool) -> None:
    x = torch.rand(1000) * scale
    theirs, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed=signed), blocksize=BLOCK_SIZE)
    codes, absmax = quantize_8bit_reference(x, signed=signed)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, state.absmax)


@BOTH
def test_dequantize_8bit_equals_bitsandbytes(signed: bool) -> None:
    codes, absmax = torch.randint(0, 256, (70_001,), dtype=torch.uint8), torch.rand(274)
    theirs = bnb.dequantize_blockwise(
        codes, absmax=absmax, code=bnb.create_dynamic_map(signed=signed), blocksize=BLOCK_SIZE
    )
    assert torch.equal(dequantize_8bit_reference(codes, absmax, signed=signed), theirs)


@BOTH
def test_dynamic_map_equals_bitsandbytes(signed: bool) -> None:
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed))
