"""decode_attention against fp64 of its definition; the kernels on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.decode_attention import default_launch
from tests.ops.decode_cases import ATTENTION_SHAPES, WINDOWS, check_decode_attention
from tests.ops.fused_cases import Place

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LARGE_SHAPES = [((200,), 32, 32, 128, 256), ((4000, 17, 900), 32, 8, 128, 4096), ((8191,), 28, 4, 128, 8192)]


@DTYPE
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_decode_attention_matches_fp64(
    shape: tuple[tuple[int, ...], int, int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    check_decode_attention(shape, dtype, Place(), window=window)


def test_default_launch_splits_long_caches_of_few_heads() -> None:
    def splits(prompts: int, query_heads: int, key_heads: int, capacity: int) -> int:
        shapes = torch.Size([prompts, query_heads, 128]), torch.Size([prompts, key_heads, capacity, 128])
        return default_launch(*shapes).num_splits

    assert splits(1, 32, 32, 64) == 1
    assert 1 < splits(1, 32, 32, 4096) <= splits(1, 32, 8, 4096)
    assert splits(8, 64, 64, 4096) == 1


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("window", [*WINDOWS, 1000])
@pytest.mark.parametrize("shape", [*ATTENTION_SHAPES, *LARGE_SHAPES], ids=str)
def test_decode_attention_kernels_on_a_gpu_match_fp64(
    shape: tuple[tuple[int, ...], int, int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    check_decode_attention(shape, dtype, Place("triton", "cuda"), window=window)
