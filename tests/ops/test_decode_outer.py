"""The adapters' outer product of a group against fp64; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.decode_cases import check_decode_outer
from tests.ops.fused_cases import Place

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CASES = [((64,), (4,)), ((70, 33, 5), (4, 4, 4)), ((40, 32, 64), (8, 0, 3))]


@DTYPE
@pytest.mark.parametrize("tokens", [1, 3])
def test_decode_outer_matches_fp64(tokens: int, dtype: torch.dtype) -> None:
    for widths, ranks in CASES:
        check_decode_outer(tokens, widths, ranks, dtype, Place(), residual=len(widths) == 1)


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("tokens", [1, 8])
def test_decode_outer_kernel_on_a_gpu_matches_fp64(tokens: int, dtype: torch.dtype) -> None:
    for widths, ranks in (*CASES, ((4096, 1024, 1024), (16, 16, 16)), ((11008, 11008), (64, 64)), ((4096,), (256,))):
        check_decode_outer(tokens, widths, ranks, dtype, Place("triton", "cuda"), residual=len(widths) == 1)
