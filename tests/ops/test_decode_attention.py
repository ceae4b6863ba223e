"""decode_attention against fp64 of its definition; the kernels on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.decode_attention import default_launch
from tests.ops.decode_cases import ATTENTION_SHAPES, WINDOWS, check_decode_attention
from tests.ops.fused_cases import Place

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROTATES = pytest.mark.parametrize("rotates", [False, True], ids=["still", "rotates"])
NORMED = pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
LARGE_SHAPES = [((200,), 32, 32, 128, 256), ((4000, 17, 900), 32, 8, 128, 4096), ((8191,), 28, 4, 128, 8192)]


@DTYPE
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_decode_attention_matches_fp64(
    shape: tuple[tuple[int, ...], int, int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    check_decode_attention(shape, dtype, Place(), window=window)


@DTYPE
@ROTATES
@NORMED
def test_decode_attention_norms_and_turns_heads(normed: bool, rotates: bool, dtype: torch.dtype) -> None:
    for shape in ATTENTION_SHAPES:
        check_decode_attention(shape, dtype, Place(), normed=normed, rotates=rotates, angle_dtype=dtype)


def test_default_launch_splits_long_caches_of_few_heads() -> None:
    def splits(prompts: int, query_heads: int, key_heads: int, capacity: int) -> int:
        return default_launch(query_heads, torch.Size([prompts, key_heads, capacity, 128])).num_splits

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
    for overlap in (False, True):
        check_decode_attention(shape, dtype, Place("triton", "cuda"), window=window, overlap=overlap)


@pytest.mark.gpu
@DTYPE
@ROTATES
@NORMED
def test_decode_attention_kernels_on_a_gpu_norm_and_turn_heads(normed: bool, rotates: bool, dtype: torch.dtype) -> None:
    place = Place("triton", "cuda")
    for shape in (*ATTENTION_SHAPES, *LARGE_SHAPES, ((9,), 32, 32, 256, 64)):
        for angle_dtype in (torch.float32, dtype):
            check_decode_attention(shape, dtype, place, normed=normed, rotates=rotates, angle_dtype=angle_dtype)
