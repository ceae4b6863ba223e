"""Checks of the operations on fp8 against their definitions, bit for bit, for any backend and device."""

from __future__ import annotations

import torch

from halfbyte.ops.adapter_columns_fp8 import adapter_columns_fp8, adapter_columns_fp8_reference
from halfbyte.ops.dequantize_fp8 import dequantize_fp8, dequantize_fp8_reference, row_scales
from halfbyte.ops.e4m3 import FP8, scale_of
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.quantize_rows_fp8 import quantize_rows_fp8, quantize_rows_fp8_reference
from halfbyte.quant import QuantSpec

FILL = 0x5A


def filled(shape: tuple[int, int], *, spare: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a buffer of bytes, and the codes of that shape at its left."""
    buffer = torch.full((shape[0], shape[1] + spare), FILL, dtype=torch.uint8, device=device)
    return buffer, buffer[:, : shape[1]].view(FP8)


def assert_same(expected: torch.Tensor, buffer: torch.Tensor) -> None:
    """Compare codes, minus zero being zero, and look whether anything beside them was written."""
    actual, expected = buffer.cpu(), expected.cpu().view(torch.uint8)
    codes = actual[:, : expected.shape[1]]
    differ = (codes != expected) & ~((codes & 0x7F == 0) & (expected & 0x7F == 0))
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} codes differ"
    assert (actual[:, expected.shape[1] :] == FILL).all()


def rows_of_many_sizes(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows whose magnitudes lie far apart, one of zeros, with elements far below the largest."""
    x = torch.randn(num_rows, width) * torch.exp2(torch.randint(-12, 8, (num_rows, 1)).float())
    x *= torch.exp2(-torch.rand(num_rows, width).square() * 18)
    x[0] = 0
    return x.to(dtype)


def check_quantize_rows(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    ranks: int = 0,
    factor: bool = False,
    spare: int = 16,
    backend: str,
    device: str,
) -> None:
    x = rows_of_many_sizes(*shape, dtype)
    u = rows_of_many_sizes(shape[0], ranks, dtype) if ranks else None
    factors = torch.exp2(torch.randint(-14, -3, (shape[1],)).float()).bfloat16() if factor else None
    columns = 3 * ranks + shape[1]
    expected, expected_scale = torch.empty(shape[0], columns, dtype=FP8), torch.empty(shape[0])
    quantize_rows_fp8_reference(x, codes_TE=expected, scale_T=expected_scale, u_TR=u, factor_D=factors)
    wide = torch.full((shape[0], shape[1] + spare), torch.nan, dtype=dtype, device=device)
    wide[:, : shape[1]] = x
    buffer, codes = filled((shape[0], columns), spare=0, device=device)
    scale = torch.empty(shape[0], device=device)
    quantize_rows_fp8(
        wide[:, : shape[1]],
        codes_TE=codes,
        scale_T=scale,
        u_TR=None if u is None else u.to(device),
        factor_D=None if factors is None else factors.to(device),
        backend=backend,
    )
    assert scale.cpu().equal(expected_scale)
    assert_same(expected, buffer)


def check_adapter_columns(shape: tuple[int, int], dtype: torch.dtype, *, backend: str, device: str) -> None:
    B = rows_of_many_sizes(*shape, dtype)
    weight_scale = torch.exp2(torch.randint(-14, -8, (shape[0],)).float())
    expected, expected_scale = torch.empty(shape[0], 3 * shape[1], dtype=FP8), torch.empty(shape[0])
    adapter_columns_fp8_reference(B, weight_scale, codes_FC=expected, scale_F=expected_scale)
    buffer, codes = filled((shape[0], 3 * shape[1]), spare=32, device=device)
    scale = torch.empty(shape[0], device=device)
    adapter_columns_fp8(B.to(device), weight_scale.to(device), codes_FC=codes, scale_F=scale, backend=backend)
    assert scale.cpu().equal(expected_scale)
    assert_same(expected, buffer)


def check_dequantize(
    shape: tuple[int, int], spec: QuantSpec, *, spare: int, larger_scales: bool = False, backend: str, device: str
) -> None:
    """Check both orders."""
    q = quantize_4bit(torch.randn(shape) * torch.rand(shape[0], 1), spec, backend="torch")
    scale = row_scales(q) * (8 if larger_scales else 1)
    for is_transposed in (False, True):
        out_shape = (shape[1], shape[0]) if is_transposed else shape
        expected = torch.empty(out_shape, dtype=FP8)
        dequantize_fp8_reference(q, scale, out=expected, is_transposed=is_transposed)
        buffer, codes = filled(out_shape, spare=spare, device=device)
        out = dequantize_fp8(q.to(device), scale.to(device), out=codes, is_transposed=is_transposed, backend=backend)
        assert out is codes
        assert_same(expected, buffer)
    weight = expected.float().T * scale[:, None]
    assert (weight.abs().amax(1) <= 448 * scale).all()
    assert scale_of(weight.abs().amax(1)).le(scale).all()
