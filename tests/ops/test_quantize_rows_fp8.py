"""quantize_rows_fp8 against what it promises; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.e4m3 import FP8
from halfbyte.ops.quantize_rows_fp8 import SHARE_OF_B, quantize_rows_fp8
from tests.ops.fp8_cases import check_quantize_rows, rows_of_many_sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_rows_fp8_keeps_four_bits_of_x_and_eight_of_u(dtype: torch.dtype) -> None:
    x, u = rows_of_many_sizes(40, 96, dtype), rows_of_many_sizes(40, 16, dtype)
    codes, scale = torch.empty(40, 48 + 96, dtype=FP8), torch.empty(40)
    quantize_rows_fp8(x, codes_TE=codes, scale_T=scale, u_TR=u)
    values = codes.float() * scale[:, None]
    # Half a unit in the last place, or of the smallest numbers that a scale leaves.
    assert ((values[:, 48:] - x).abs() <= torch.maximum(x.abs() / 16, scale[:, None] * 2**-10)).all()
    high, again, low = values[:, :48].split(16, dim=1)
    assert high.equal(again)
    exact = u / SHARE_OF_B
    assert ((high + low - exact).abs() <= torch.maximum(exact.abs() / 256, scale[:, None] * 2**-10)).all()
    largest = torch.maximum(x.abs().amax(1), exact.abs().amax(1))[1:]
    assert (largest <= 448 * scale[1:]).all()
    assert (largest > 223 * scale[1:]).all()


def test_quantize_rows_fp8_of_zeros_is_zero() -> None:
    codes, scale = torch.empty(2, 64, dtype=FP8), torch.empty(2)
    quantize_rows_fp8(torch.zeros(2, 64), codes_TE=codes, scale_T=scale)
    assert not codes.float().any()
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_quantize_rows_fp8_hides_no_overflow(value: float) -> None:
    x = torch.ones(2, 64)
    x[1, 5] = value
    codes, scale = torch.empty(2, 64, dtype=FP8), torch.empty(2)
    quantize_rows_fp8(x, codes_TE=codes, scale_T=scale)
    y = (codes.float() * scale[:, None] * torch.full((64,), 1e3)).sum(1)
    assert y[0].isfinite()
    assert not (y[1].abs() < 1e30)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [0, 16, 48, 192])
@pytest.mark.parametrize("factor", [False, True], ids=["", "factors"])
def test_quantize_rows_fp8_kernel_on_a_gpu(dtype: torch.dtype, ranks: int, factor: bool) -> None:
    for shape in ((5, 64), (33, 576), (17, 4096), (9, 11008), (9, 22016), (3, 40000)):
        for spare in (0, 16):
            check_quantize_rows(shape, dtype, ranks=ranks, factor=factor, spare=spare, backend="triton", device="cuda")
