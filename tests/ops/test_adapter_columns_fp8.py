"""adapter_columns_fp8 against what it promises; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.adapter_columns_fp8 import adapter_columns_fp8
from halfbyte.ops.e4m3 import FP8
from halfbyte.ops.quantize_rows_fp8 import SHARE_OF_B
from tests.ops.fp8_cases import check_adapter_columns, rows_of_many_sizes


def test_adapter_columns_fp8_keep_eight_bits() -> None:
    B, weight_scale = rows_of_many_sizes(64, 16, torch.float32), torch.full((64,), 2.0**-10)
    codes, scale = torch.empty(64, 48, dtype=FP8), torch.empty(64)
    adapter_columns_fp8(B, weight_scale, codes_FC=codes, scale_F=scale)
    high, low, again = (codes.float() * scale[:, None] / SHARE_OF_B).split(16, dim=1)
    assert high.equal(again)
    floor = scale[:, None] * 2**-10 / SHARE_OF_B
    assert ((high + low - B).abs() <= torch.maximum(B.abs() / 256, floor)).all()
    assert (scale >= weight_scale).all()
    assert scale.gt(weight_scale).equal(B.abs().amax(1) * SHARE_OF_B > 448 * weight_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_adapter_columns_fp8_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in ((48, 16), (12288, 48), (22016, 32), (70, 192)):
        check_adapter_columns(shape, dtype, backend="triton", device="cuda")
