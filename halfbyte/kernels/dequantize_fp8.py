"""Restore a 4-bit weight as fp8 on a GPU, in its own order or transposed, in one launch.

A group is a stretch of elements that lie in one block of one row. In the weight's own order a program takes a tile of
whole groups, as `dequantize_4bit` does: every thread reads the 8 bytes that make one 16-byte store.

Transposed, a program takes a tile of rows and columns. Four rows at a time are restored, each thread those of its
columns, and their four codes joined to one word, so that what changes places in shared memory is words, not bytes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from halfbyte.kernels.dequantize_4bit import Scales
from halfbyte.kernels.e4m3 import as_stored, encode_function, inverse_function
from halfbyte.kernels.launch import launch

# F out_features, D in_features

ELEMENTS_PER_PROGRAM = 4096
MAX_GROUP = 64
TILE_ROWS, TILE_COLUMNS, TRANSPOSING_WARPS = 128, 64, 4


def dequantize_fp8(
    packed: torch.Tensor,
    scales: Scales,
    table: torch.Tensor,
    row_scale_F: torch.Tensor,
    out_FD: torch.Tensor,
    *,
    block_size: int,
) -> None:
    """Write the restored weight over the scales of its rows.

    Args:
        packed: uint8 [numel / 2].
        scales: Of the blocks of the flattened weight.
        table: The 16 values, fp32.
        row_scale_F: Powers of two, fp32.
        out_FD: e4m3, rows of any stride; an even width.
        block_size: Elements that share one absmax.
    """
    num_rows, width = out_FD.shape
    group = math.gcd(width, block_size, MAX_GROUP)
    groups = ELEMENTS_PER_PROGRAM // group
    num_groups = num_rows * width // group
    launch(
        _kernel(),
        -(-num_groups // groups),
        packed,
        *_pointers(scales),
        table,
        row_scale_F,
        as_stored(out_FD),
        num_groups,
        out_FD.stride(0),
        INVERSE=inverse_function(),
        ENCODE=encode_function(),
        ABSMAX=_absmax_function(),
        NATIVE=packed.is_cuda,
        DOUBLE_QUANT=scales.scale is not None,
        BLOCK_SIZE=block_size,
        GROUP=group,
        GROUPS=groups,
        WIDTH=width,
        ALIGNMENT=math.gcd(out_FD.stride(0), group, 16),
        num_warps=4,
    )


def dequantize_fp8_transposed(
    packed: torch.Tensor,
    scales: Scales,
    table: torch.Tensor,
    row_scale_F: torch.Tensor,
    out_DF: torch.Tensor,
    *,
    block_size: int,
) -> None:
    """Write the restored weight, transposed.

    Args:
        packed: uint8 [numel / 2].
        scales: Of the blocks of the flattened weight.
        table: The 16 values, fp32.
        row_scale_F: Powers of two, fp32.
        out_DF: e4m3, rows of any stride; strides, offset and the number of columns are multiples of 4.
        block_size: Elements that share one absmax.
    """
    width, num_rows = out_DF.shape
    words_DW = as_stored(out_DF).view(torch.uint8).view(torch.int32)
    tiles_across = -(-width // TILE_COLUMNS)
    launch(
        _transposing_kernel(),
        tiles_across * -(-num_rows // TILE_ROWS),
        packed,
        *_pointers(scales),
        table,
        row_scale_F,
        words_DW,
        num_rows,
        tiles_across,
        words_DW.stride(0),
        INVERSE=inverse_function(),
        ENCODE=encode_function(),
        ABSMAX=_absmax_function(),
        NATIVE=packed.is_cuda,
        DOUBLE_QUANT=scales.scale is not None,
        BLOCK_SIZE=block_size,
        GROUP=math.gcd(width, block_size, MAX_GROUP),
        WIDTH=width,
        WORDS=TILE_ROWS // 4,
        COLUMNS=TILE_COLUMNS,
        ALIGNMENT=math.gcd(words_DW.stride(0), 4),
        num_warps=TRANSPOSING_WARPS,
    )


def _pointers(scales: Scales) -> tuple[torch.Tensor, ...]:
    absent = scales.absmax
    scale = absent if scales.scale is None else scales.scale
    return scales.absmax, scale, absent if scales.offset is None else scales.offset, scales.dynamic_map


@functools.cache
def _absmax_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _absmax(block, mask, absmax_ptr, scale_ptr, offset_ptr, map_ptr, DOUBLE_QUANT: tl.constexpr):
        """Return absmax of blocks, in fp32; each step is rounded by itself."""
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
        if DOUBLE_QUANT:
            scale = tl.load(scale_ptr + block // 256, mask=mask, other=0)
            absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
        return absmax

    return _absmax


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_groups", "row_stride"])
    def _dequantize_fp8_kernel(
        packed_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, table_ptr, row_scale_ptr, out_ptr,
        num_groups, row_stride,
        INVERSE: tl.constexpr, ENCODE: tl.constexpr, ABSMAX: tl.constexpr,
        NATIVE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
        GROUPS: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        # Addresses: a 64-bit scalar for the tile, 32-bit offsets inside it.
        first = tl.program_id(0).to(tl.int64) * GROUPS
        group = first + tl.arange(0, GROUPS)
        in_range = group < num_groups
        row = group // (WIDTH // GROUP)
        factor = ABSMAX(
            group // (BLOCK_SIZE // GROUP), in_range, absmax_ptr, scale_ptr, offset_ptr, map_ptr, DOUBLE_QUANT
        )
        # A power of two: it does not matter which product is rounded.
        factor *= INVERSE(tl.load(row_scale_ptr + row, mask=in_range, other=1.0))

        byte = tl.max_contiguous(tl.arange(0, GROUPS * GROUP // 2), 8)
        byte_mask = first * (GROUP // 2) + byte < num_groups.to(tl.int64) * (GROUP // 2)
        packed = tl.load(packed_ptr + first * (GROUP // 2) + byte, mask=byte_mask, other=0).to(tl.int32)
        even = tl.load(table_ptr + (packed >> 4))
        odd = tl.load(table_ptr + (packed & 15))
        values = tl.reshape(tl.join(even, odd), [GROUPS, GROUP]) * factor[:, None]
        offset = row * row_stride + group % (WIDTH // GROUP) * GROUP
        offset = tl.multiple_of(offset, ALIGNMENT)[:, None] + tl.arange(0, GROUP)[None, :]
        tl.store(out_ptr + offset, ENCODE(values, NATIVE), mask=in_range[:, None])

    return _dequantize_fp8_kernel


@functools.cache
def _transposing_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_rows", "tiles_across", "word_stride"])
    def _dequantize_fp8_transposed_kernel(
        packed_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, table_ptr, row_scale_ptr, words_ptr,
        num_rows, tiles_across, word_stride,
        INVERSE: tl.constexpr, ENCODE: tl.constexpr, ABSMAX: tl.constexpr,
        NATIVE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
        WIDTH: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        tile_row = (tl.program_id(0) // tiles_across).to(tl.int64) * (4 * WORDS)
        first_column = tl.program_id(0) % tiles_across * COLUMNS
        # One dimension up to the lookup, as in dequantize_4bit.
        byte = tl.arange(0, WORDS * COLUMNS // 2)
        byte_row = byte // (COLUMNS // 2) * 4
        byte_column = byte % (COLUMNS // 2) + first_column // 2
        group_row = tl.arange(0, WORDS)[:, None] * 4
        group_column = tl.arange(0, COLUMNS // GROUP)[None, :] + first_column // GROUP
        words = tl.zeros([WORDS, COLUMNS], tl.int32)
        for number in tl.static_range(4):
            row = tile_row + byte_row + number
            mask = (row < num_rows) & (byte_column < WIDTH // 2)
            packed = tl.load(packed_ptr + row * (WIDTH // 2) + byte_column, mask=mask, other=0).to(tl.int32)
            even = tl.load(table_ptr + (packed >> 4))
            odd = tl.load(table_ptr + (packed & 15))

            row = tile_row + group_row + number
            in_range = (row < num_rows) & (group_column < WIDTH // GROUP)
            block = (row * (WIDTH // GROUP) + group_column) // (BLOCK_SIZE // GROUP)
            factor = ABSMAX(block, in_range, absmax_ptr, scale_ptr, offset_ptr, map_ptr, DOUBLE_QUANT)
            factor *= INVERSE(tl.load(row_scale_ptr + row, mask=row < num_rows, other=1.0))
            values = tl.reshape(tl.join(even, odd), [WORDS, COLUMNS // GROUP, GROUP]) * factor[:, :, None]
            code = ENCODE(tl.reshape(values, [WORDS, COLUMNS]), NATIVE).to(tl.uint8, bitcast=True)
            words |= code.to(tl.int32) << (8 * number)
        column = first_column + tl.arange(0, COLUMNS)
        word = tl.arange(0, WORDS)[None, :]
        offset = tl.multiple_of(column.to(tl.int64) * word_stride + tile_row // 4, ALIGNMENT)
        mask = (column < WIDTH)[:, None] & (tile_row + 4 * word < num_rows)
        tl.store(words_ptr + offset[:, None] + word, tl.trans(words), mask=mask)

    return _dequantize_fp8_transposed_kernel
