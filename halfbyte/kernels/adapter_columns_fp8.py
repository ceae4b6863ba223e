"""Bring the B of adapters to fp8 beside their weights on a GPU, and find the scales of the rows they share.

A program takes a tile of rows, all ranks of them; a row's largest magnitude is a matter of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from halfbyte.kernels.e4m3 import as_stored, encode_function, inverse_function, round_function, scale_function
from halfbyte.kernels.launch import launch

ROWS_PER_PROGRAM = 32


def adapter_columns_fp8(
    B_FR: torch.Tensor,
    weight_scale_F: torch.Tensor,
    codes_FC: torch.Tensor,
    scale_F: torch.Tensor,
    *,
    B_factor: float,
) -> None:
    """Write codes and scales; arguments as those of the op, B contiguous."""
    num_rows, ranks = B_FR.shape
    launch(
        _kernel(),
        -(-num_rows // ROWS_PER_PROGRAM),
        B_FR,
        weight_scale_F,
        as_stored(codes_FC),
        scale_F,
        codes_FC.stride(0),
        num_rows,
        B_factor,
        SCALE=scale_function(),
        INVERSE=inverse_function(),
        ROUND=round_function(),
        ENCODE=encode_function(),
        NATIVE=B_FR.is_cuda,
        RANKS=ranks,
        BLOCK_RANKS=1 << (ranks - 1).bit_length(),
        ROWS=ROWS_PER_PROGRAM,
        num_warps=4,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["stride", "num_rows"])
    def _adapter_columns_fp8_kernel(
        B_ptr, weight_scale_ptr, codes_ptr, scale_ptr, stride, num_rows, B_factor,
        SCALE: tl.constexpr, INVERSE: tl.constexpr, ROUND: tl.constexpr, ENCODE: tl.constexpr,
        NATIVE: tl.constexpr, RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        in_range = row < num_rows
        rank = tl.arange(0, BLOCK_RANKS)[None, :]
        mask = in_range[:, None] & (rank < RANKS)
        B = tl.load(B_ptr + row[:, None] * RANKS + rank, mask=mask, other=0).to(tl.float32) * B_factor
        scale = SCALE(tl.max(tl.abs(B), axis=1))
        scale = tl.maximum(scale, tl.load(weight_scale_ptr + row, mask=in_range, other=1.0))
        tl.store(scale_ptr + row, scale, mask=in_range)
        B *= INVERSE(scale)[:, None]
        high = ROUND(B)
        low = ENCODE(B - high, NATIVE)
        code = ENCODE(high, NATIVE)
        place = codes_ptr + row[:, None] * stride + rank
        tl.store(place, code, mask=mask)
        tl.store(place + RANKS, low, mask=mask)
        tl.store(place + 2 * RANKS, code, mask=mask)

    return _adapter_columns_fp8_kernel
