"""rotate_into_cache against fp64 of its formula; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.decode_cases import check_rotate_into_cache
from tests.ops.fused_cases import Place

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROTATES = pytest.mark.parametrize("rotates", [False, True], ids=["still", "rotates"])
NORMED = pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
CASES = [((0,), (1, 1, 16)), ((3, 0, 7), (4, 2, 80)), ((5, 6), (3, 3, 128))]


@DTYPE
@ROTATES
@NORMED
def test_rotate_into_cache_matches_fp64(normed: bool, rotates: bool, dtype: torch.dtype) -> None:
    for lengths, heads in CASES:
        check_rotate_into_cache(lengths, heads, dtype, Place(), normed=normed, rotates=rotates, angle_dtype=dtype)


@pytest.mark.gpu
@DTYPE
@ROTATES
@NORMED
def test_rotate_into_cache_kernel_on_a_gpu_matches_fp64(normed: bool, rotates: bool, dtype: torch.dtype) -> None:
    for lengths, heads in (*CASES, ((4000, 2), (32, 8, 128)), ((9,), (32, 32, 256))):
        for angle_dtype in (torch.float32, dtype):
            place = Place("triton", "cuda")
            check_rotate_into_cache(
                lengths, heads, dtype, place, normed=normed, rotates=rotates, angle_dtype=angle_dtype
            )
