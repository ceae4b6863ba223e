"""Restore a 4-bit weight on a GPU: both levels of double quantisation undone in one launch.

One program restores a tile of whole blocks, [BLOCKS, BLOCK_SIZE / 2] packed bytes. Every thread reads the few bytes
that make one 16-byte store, so loads and stores are coalesced and values never change threads. Rounding is that of
the reference: enable_fp_fusion is off, or multiply and add would become one rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import torch

from halfbyte.kernels.launch import launch as launch_kernel


@dataclasses.dataclass(frozen=True, slots=True)
class DequantizeLaunch:
    """How the kernel is launched. None of it changes the result, but for lookup "rounded"."""

    lookup: Literal["codes", "pairs", "rounded"] = "codes"
    """What `table` holds: the 16 values in fp32; 256 pairs in fp32, one a byte; 256 pairs in the dtype of the output.

    The first reads one cache line, twice a byte. "rounded" halves the table of pairs but rounds twice.
    """
    elements_per_program: int = 2048
    num_warps: int = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Scales:
    """absmax, in fp32 or in 8 bits with its second level."""

    absmax: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    dynamic_map: torch.Tensor


def dequantize_4bit(
    packed: torch.Tensor,
    scales: Scales,
    table: torch.Tensor,
    out: torch.Tensor,
    *,
    block_size: int,
    launch: DequantizeLaunch,
) -> None:
    """Write the restored weight to `out`.

    Args:
        packed: uint8 [(numel + 1) // 2].
        scales: Of the blocks of the flattened weight.
        table: As `launch.lookup` says, contiguous.
        out: fp32, fp16 or bf16; contiguous, or a matrix of larger row stride. Stores are 16 bytes wide where its row
            stride is a multiple of 16 elements.
        block_size: Elements that share one absmax.
        launch: How to launch.
    """
    num_blocks = scales.absmax.numel()
    blocks_per_program = max(1, launch.elements_per_program // block_size)
    width, row_stride, rows = out.numel(), 0, "flat"
    if not out.is_contiguous():
        width, row_stride = out.shape[1], out.stride(0)
        rows = "blocks" if width % block_size == 0 else "elements"
    # Pairs "rounded" to fp32 are not rounded.
    lookup = "pairs" if launch.lookup == "rounded" and table.dtype == torch.float32 else launch.lookup
    launch_kernel(
        _kernel(),
        -(-num_blocks // blocks_per_program),
        packed,
        scales.absmax,
        scales.absmax if scales.scale is None else scales.scale,
        scales.absmax if scales.offset is None else scales.offset,
        scales.dynamic_map,
        table if lookup == "codes" else table.view(-1).view(_WORD[table.dtype]),
        out,
        num_blocks,
        packed.numel(),
        out.numel(),
        width,
        row_stride,
        LOOKUP=lookup,
        ROWS=rows,
        DOUBLE_QUANT=scales.scale is not None,
        PARTIAL=out.numel() % block_size != 0,
        BLOCK_SIZE=block_size,
        BLOCKS=blocks_per_program,
        BYTES_PER_THREAD=8 // out.itemsize,
        ALIGNMENT=math.gcd(row_stride, 16),
        num_warps=launch.num_warps,
    )


_WORD = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _dequantize_4bit_kernel(
        packed_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, table_ptr, out_ptr,
        num_blocks, num_bytes, numel, width, row_stride,
        LOOKUP: tl.constexpr, ROWS: tl.constexpr, DOUBLE_QUANT: tl.constexpr, PARTIAL: tl.constexpr,
        BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, BYTES_PER_THREAD: tl.constexpr,
        ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        # Addresses: a 64-bit scalar for the tile, 32-bit offsets inside it.
        first = tl.program_id(0).to(tl.int64) * BLOCKS
        start = first * BLOCK_SIZE
        block = tl.arange(0, BLOCKS)
        in_range = first + block < num_blocks

        absmax = tl.load(absmax_ptr + first + block, mask=in_range, other=0)
        if DOUBLE_QUANT:
            group = first // 256 if BLOCKS <= 256 else (first + block) // 256
            scale = tl.load(scale_ptr + group, mask=group * 256 < num_blocks, other=0)
            absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)

        # One dimension up to the lookup: for a matrix the compiler would choose another layout for the lookup than for
        # the load, and pass bytes through shared memory.
        byte = tl.max_contiguous(tl.arange(0, BLOCKS * BLOCK_SIZE // 2), BYTES_PER_THREAD)
        byte_mask = start // 2 + byte < num_bytes
        packed = tl.load(packed_ptr + start // 2 + byte, mask=byte_mask, other=0).to(tl.int32)
        if LOOKUP == "codes":
            even = tl.load(table_ptr + (packed >> 4))
            odd = tl.load(table_ptr + (packed & 15))
        elif LOOKUP == "pairs":
            pair = tl.load(table_ptr + packed)
            even = pair.to(tl.int32).to(tl.float32, bitcast=True)
            odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        else:
            pair = tl.load(table_ptr + packed)
            even = pair.to(tl.int16).to(out_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
            odd = (pair >> 16).to(tl.int16).to(out_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
        values = tl.reshape(tl.join(even, odd), [BLOCKS, BLOCK_SIZE]) * absmax[:, None]
        values = values.to(out_ptr.dtype.element_ty)

        in_block = tl.arange(0, BLOCK_SIZE)[None, :]
        element = block[:, None] * BLOCK_SIZE + in_block
        mask = in_range[:, None] & (element >= 0)
        if PARTIAL:
            mask = start + element < numel
        if ROWS == "flat":
            tl.store(out_ptr + start + element, values, mask=mask)
        else:
            row = start // width
            column = (start % width).to(tl.int32) + (block * BLOCK_SIZE if ROWS == "blocks" else element)
            offset = (row + column // width) * row_stride + column % width
            if ROWS == "blocks":
                offset = tl.multiple_of(offset, ALIGNMENT)[:, None] + in_block
            tl.store(out_ptr + offset, values, mask=mask)

    return _dequantize_4bit_kernel
