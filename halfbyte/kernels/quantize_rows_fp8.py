"""Bring the rows of a matrix to fp8 on a GPU, each with its scale, in one pass over them.

A program takes a row. It stays in registers between the search for its largest magnitude and the rounding; of rows
wider than MAX_BLOCK the first chunk stays, and the others are read twice. Before it go the row's columns of adapters,
see `halfbyte.ops.quantize_rows_fp8`.

Traffic for 16 bits: 3 bytes an element.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from halfbyte.kernels.e4m3 import as_stored, encode_function, inverse_function, round_function, scale_function
from halfbyte.kernels.launch import launch

MAX_BLOCK = 32768
# What a program takes of rows wider than that, at a time.
CHUNK = 8192
ELEMENTS_PER_THREAD = 32


def quantize_rows_fp8(
    x_TD: torch.Tensor,
    u_TR: torch.Tensor | None,
    factor_D: torch.Tensor | None,
    codes_TE: torch.Tensor,
    scale_T: torch.Tensor,
    *,
    u_factor: float,
) -> None:
    """Write codes and scales; arguments as those of the op, `u_TR` contiguous."""
    num_tokens, width = x_TD.shape
    ranks = 0 if u_TR is None else u_TR.shape[1]
    block = 1 << (width - 1).bit_length()
    if block > MAX_BLOCK:
        block = CHUNK
    launch(
        _kernel(),
        num_tokens,
        x_TD,
        x_TD if u_TR is None else u_TR,
        x_TD if factor_D is None else factor_D,
        as_stored(codes_TE),
        scale_T,
        x_TD.stride(0),
        u_factor,
        SCALE=scale_function(),
        INVERSE=inverse_function(),
        ROUND=round_function(),
        ENCODE=encode_function(),
        LOAD=_load_function(),
        NATIVE=x_TD.is_cuda,
        FACTOR=factor_D is not None,
        WIDTH=width,
        RANKS=ranks,
        BLOCK_RANKS=max(1, 1 << (ranks - 1).bit_length()) if ranks else 1,
        BLOCK=block,
        ALIGNMENT=math.gcd(x_TD.stride(0), 16),
        num_warps=max(1, min(16, block // (32 * ELEMENTS_PER_THREAD))),
    )


@functools.cache
def _load_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _load(column, x_ptr, factor_ptr, FACTOR: tl.constexpr, WIDTH: tl.constexpr):
        """Return a chunk of x times the columns' factors."""
        mask = column < WIDTH
        x = tl.load(x_ptr + column, mask=mask, other=0).to(tl.float32)
        if FACTOR:
            x *= tl.load(factor_ptr + column, mask=mask, other=0).to(tl.float32)
        return x

    return _load


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["x_stride"])
    def _quantize_rows_fp8_kernel(
        x_ptr, u_ptr, factor_ptr, codes_ptr, scale_ptr, x_stride, u_factor,
        SCALE: tl.constexpr, INVERSE: tl.constexpr, ROUND: tl.constexpr, ENCODE: tl.constexpr, LOAD: tl.constexpr,
        NATIVE: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
        BLOCK_RANKS: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        # Addresses: a 64-bit scalar for the row, 32-bit offsets inside it.
        row = tl.program_id(0).to(tl.int64)
        x_row = x_ptr + tl.multiple_of(row * x_stride, ALIGNMENT)
        codes_row = codes_ptr + row * (3 * RANKS + WIDTH)
        column = tl.arange(0, BLOCK)
        x = LOAD(column, x_row, factor_ptr, FACTOR, WIDTH)
        largest = tl.max(tl.abs(x), axis=0)
        if WIDTH > BLOCK:
            start = BLOCK
            while start < WIDTH:
                more = LOAD(start + column, x_row, factor_ptr, FACTOR, WIDTH)
                largest = tl.maximum(largest, tl.max(tl.abs(more), axis=0))
                start += BLOCK
        if RANKS > 0:
            rank = tl.arange(0, BLOCK_RANKS)
            in_row = rank < RANKS
            u = tl.load(u_ptr + row * RANKS + rank, mask=in_row, other=0).to(tl.float32) * u_factor
            largest = tl.maximum(largest, tl.max(tl.abs(u), axis=0))
        scale = SCALE(largest)
        inverse = INVERSE(scale)
        tl.store(scale_ptr + row, scale)
        if RANKS > 0:
            u *= inverse
            high = ROUND(u)
            tl.store(codes_row + rank, ENCODE(high, NATIVE), mask=in_row)
            tl.store(codes_row + RANKS + rank, ENCODE(high, NATIVE), mask=in_row)
            tl.store(codes_row + 2 * RANKS + rank, ENCODE(u - high, NATIVE), mask=in_row)
        wide_row = codes_row + 3 * RANKS
        tl.store(wide_row + column, ENCODE(x * inverse, NATIVE), mask=column < WIDTH)
        if WIDTH > BLOCK:
            start = BLOCK
            while start < WIDTH:
                more = LOAD(start + column, x_row, factor_ptr, FACTOR, WIDTH)
                tl.store(wide_row + start + column, ENCODE(more * inverse, NATIVE), mask=start + column < WIDTH)
                start += BLOCK

    return _quantize_rows_fp8_kernel
