"""The Triton kernels that decode one token under Triton's interpreter, run in a process of their own."""

from __future__ import annotations

import functools

import pytest
import torch

from halfbyte.kernels.decode_attention import DecodeAttentionLaunch
from halfbyte.nn import decode_group
from halfbyte.ops.matvec_4bit import matvec_4bit_group
from tests.models.test_static_decoder import PROMPTS, check_logits, make_fused
from tests.ops.decode_cases import (
    ATTENTION_SHAPES,
    WINDOWS,
    check_decode_attention,
    check_decode_inner,
)
from tests.ops.fused_cases import Place

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def interpreted(dtype: torch.dtype) -> Place:
    # To bf16 the interpreter cuts off, up to twice the error of a rounding.
    return Place("triton", "cpu", roundings=2 if dtype == torch.bfloat16 else 1, spare=5)


@DTYPE
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_decode_attention_kernels_match_fp64(
    shape: tuple[tuple[int, ...], int, int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    check_decode_attention(shape, dtype, interpreted(dtype), window=window)
    for splits, keys in ((1, 16), (5, 4)):
        launch = DecodeAttentionLaunch(num_splits=splits, keys_per_step=keys)
        check_decode_attention(shape, dtype, interpreted(dtype), window=window, launch=launch)


@DTYPE
@pytest.mark.parametrize("rotates", [False, True], ids=["still", "rotates"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_decode_attention_kernels_norm_and_turn_heads(normed: bool, rotates: bool, dtype: torch.dtype) -> None:
    for shape in ATTENTION_SHAPES:
        check_decode_attention(shape, dtype, interpreted(dtype), window=40, normed=normed, rotates=rotates)


@DTYPE
@pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
@pytest.mark.parametrize("shape", [(1, 64, 4), (3, 576, 5), (2, 5000, 3), (1, 100, 0), (2, 9000, 0), (1, 20000, 2)])
def test_decode_inner_kernel_matches_fp64(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    check_decode_inner(kind, shape, dtype, interpreted(dtype))


def test_static_decoder_of_these_kernels_gives_the_librarys_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own interpreted tests are elsewhere; here it would take minutes.
    multiply = functools.partial(matvec_4bit_group, backend="torch")
    monkeypatch.setattr(decode_group, "matvec_4bit_group", lambda *args, backend, **terms: multiply(*args, **terms))
    check_logits(make_fused("qwen3"), PROMPTS[:2], steps=3, backend="triton")
