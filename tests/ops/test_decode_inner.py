"""What comes between two products, against fp64; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.decode_cases import check_decode_inner
from tests.ops.fused_cases import Place

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
KIND = pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
SHAPES = [(1, 64, 4), (3, 576, 5), (1, 100, 0)]


@DTYPE
@KIND
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_inner_matches_fp64(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    check_decode_inner(kind, shape, dtype, Place())


@pytest.mark.gpu
@DTYPE
@KIND
@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096, 48), (8, 11008, 16), (2, 28672, 256), (8, 8192, 0)])
def test_decode_inner_kernel_on_a_gpu_matches_fp64(
    shape: tuple[int, int, int], overlap: bool, kind: str, dtype: torch.dtype
) -> None:
    check_decode_inner(kind, shape, dtype, Place("triton", "cuda"), overlap=overlap)
