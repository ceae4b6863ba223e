"""Quantise a weight to 4 bits on a GPU: one launch for codes and absmax, one more for the 8-bit form of absmax.

The second needs the mean of all absmax. The first leaves the sum of each program's, and every program of the second
adds these up again, in fp64: a few kilobytes from the cache, where a separate reduction would read absmax once more.

One program quantises a tile of whole blocks, [BLOCKS, BLOCK_SIZE], a thread reading 16 bytes at a time; a block's
maximum is taken over the few threads that share it. The bit pattern of |x| orders like |x|, NaN on top, so absmax is
an integer maximum that does not lose a NaN.

The search for the code has two forms, which give the same codes:

    bins    index a table of 32 bins, each with at most one threshold, and compare once (NF4 only: FP4's are too close)
    tree    four levels of comparisons against thresholds held in registers

Fifteen plain comparisons would take more instructions than the memory traffic leaves time for. Divisions are IEEE's,
and enable_fp_fusion is off, so every device gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizeLaunch:
    """How the kernel is launched; none of it changes the result."""

    search: Literal["bins", "tree"] = "bins"
    elements_per_program: int = 4096
    num_warps: int = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Search:
    """The tables of a codebook."""

    thresholds: torch.Tensor
    """fp32 [15], ascending."""
    sorted_codes: torch.Tensor | None
    """int32 [16], the code of each sorted place; None where that is the place."""
    bin_base: torch.Tensor | None
    """int32 [32], the number of thresholds in lower bins; None where 31 bins are too few."""
    bin_threshold: torch.Tensor | None
    """fp32 [32], the bin's own threshold, or infinity."""


BIN_SCALE = 15
"""Bins of the search "bins" are 1 / 15 wide: bin(x) = round(15 x) + 15. The 32nd is for NaN."""


def quantize_4bit(
    flat: torch.Tensor,
    search: Search,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    sums: torch.Tensor | None = None,
    *,
    block_size: int,
    launch: QuantizeLaunch,
) -> None:
    """Write codes and absmax of a flattened weight.

    Args:
        flat: fp32, fp16 or bf16, contiguous.
        search: The codebook's tables.
        packed: uint8 [(numel + 1) // 2], written.
        absmax: fp32 [blocks], written.
        sums: fp32 [num_programs(blocks)], written: absmax summed over each program.
        block_size: Elements that share one absmax.
        launch: How to launch.
    """
    num_blocks = absmax.numel()
    use_bins = launch.search == "bins"
    with torch.cuda.device_of(flat):
        _quantize_kernel()[(num_programs(num_blocks, block_size=block_size, launch=launch),)](
            flat,
            packed,
            absmax,
            absmax if sums is None else sums,
            search.bin_threshold if use_bins else search.thresholds,
            search.bin_base if use_bins else search.thresholds,
            search.thresholds if search.sorted_codes is None else search.sorted_codes,
            num_blocks,
            packed.numel(),
            flat.numel(),
            FIND_PLACE=_find_place_by_bins() if use_bins else _find_place_by_tree(),
            REORDER=search.sorted_codes is not None,
            PARTIAL=flat.numel() % block_size != 0,
            SUMS=sums is not None,
            BLOCK_SIZE=block_size,
            BLOCKS=_blocks_per_program(block_size, launch),
            BYTES_PER_THREAD=8 // flat.itemsize,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )


def num_programs(num_blocks: int, *, block_size: int, launch: QuantizeLaunch) -> int:
    """Return how many programs `quantize_4bit` launches."""
    return -(-num_blocks // _blocks_per_program(block_size, launch))


def _blocks_per_program(block_size: int, launch: QuantizeLaunch) -> int:
    return max(1, launch.elements_per_program // block_size)


def quantize_absmax(
    absmax: torch.Tensor,
    sums: torch.Tensor,
    dynamic_codes: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    """Write the 8-bit form of absmax.

    Args:
        absmax: fp32 [blocks].
        sums: fp32, any number of partial sums of absmax.
        dynamic_codes: uint8 [65536].
        codes: uint8 [blocks], written.
        scale: fp32 [ceil(blocks / 256)], written.
        offset: fp32 scalar, written: the mean of absmax.
    """
    with torch.cuda.device_of(absmax):
        _absmax_kernel()[(-(-scale.numel() // GROUPS_PER_PROGRAM),)](
            absmax,
            sums,
            dynamic_codes,
            codes,
            scale,
            offset,
            absmax.numel(),
            sums.numel(),
            GROUPS=GROUPS_PER_PROGRAM,
            CHUNK=SUMS_PER_CHUNK,
            num_warps=8,
            enable_fp_fusion=False,
        )


GROUPS_PER_PROGRAM = 16
SUMS_PER_CHUNK = 4096


@functools.cache
def _quantize_kernel() -> Any:
    # The search is an argument: the interpreter does not see the names around a nested function.
    import triton
    import triton.language as tl

    @triton.jit
    def _quantize_4bit_kernel(
        x_ptr, packed_ptr, absmax_ptr, sum_ptr, threshold_ptr, base_ptr, code_ptr, num_blocks, num_bytes, numel,
        FIND_PLACE: tl.constexpr, REORDER: tl.constexpr, PARTIAL: tl.constexpr, SUMS: tl.constexpr,
        BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, BYTES_PER_THREAD: tl.constexpr,
    ):  # fmt: skip
        # Addresses: a 64-bit scalar for the tile, 32-bit offsets inside it.
        first = tl.program_id(0).to(tl.int64) * BLOCKS
        start = first * BLOCK_SIZE
        element = tl.arange(0, BLOCKS * BLOCK_SIZE)
        x = tl.load(x_ptr + start + element, mask=start + element < numel, other=0.0).to(tl.float32)
        x = tl.reshape(x, [BLOCKS, BLOCK_SIZE])

        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        block = first + tl.arange(0, BLOCKS)
        # Written so that NaN stays.
        at_least = tl.where(absmax < 1e-38, 1e-38, absmax)
        scaled = x * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), at_least)[:, None]
        if PARTIAL:
            is_short = (block + 1) * BLOCK_SIZE > numel
            absmax = tl.where(is_short, at_least, absmax)
            if tl.program_id(0) == tl.num_programs(0) - 1:
                quotient = tl.div_rn(x, tl.broadcast_to(at_least[:, None], [BLOCKS, BLOCK_SIZE]))
                scaled = tl.where(is_short[:, None], quotient, scaled)
        tl.store(absmax_ptr + block, absmax, mask=block < num_blocks)
        if SUMS:
            tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.where(block < num_blocks, absmax, 0.0)))

        code = FIND_PLACE(tl.reshape(scaled, [BLOCKS * BLOCK_SIZE]), threshold_ptr, base_ptr)
        if REORDER:
            code = tl.load(code_ptr + code)
        even, odd = tl.split(tl.reshape(code, [BLOCKS * BLOCK_SIZE // 2, 2]))
        # As wide as the pairs of one 16-byte load, or they would change threads on their way out.
        byte = tl.max_contiguous(tl.arange(0, BLOCKS * BLOCK_SIZE // 2), BYTES_PER_THREAD)
        tl.store(packed_ptr + start // 2 + byte, (even << 4 | odd).to(tl.uint8), mask=start // 2 + byte < num_bytes)

    return _quantize_4bit_kernel


@functools.cache
def _find_place_by_bins() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _find_place_by_bins_kernel(x, threshold_ptr, base_ptr):
        # Adding 2**23 rounds to an integer and leaves it in the low bits of the pattern.
        shifted = tl.fma(x, tl.full([1], 15.0, tl.float32), tl.full([1], 8388608.0 + 15.0, tl.float32))
        index = shifted.to(tl.int32, bitcast=True) & 31
        return tl.load(base_ptr + index) + (x > tl.load(threshold_ptr + index)).to(tl.int32)

    return _find_place_by_bins_kernel


@functools.cache
def _find_place_by_tree() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _find_place_by_tree_kernel(x, threshold_ptr, base_ptr):
        half = x > tl.load(threshold_ptr + 7)
        quarter = x > tl.where(half, tl.load(threshold_ptr + 11), tl.load(threshold_ptr + 3))
        low = tl.where(quarter, tl.load(threshold_ptr + 5), tl.load(threshold_ptr + 1))
        high = tl.where(quarter, tl.load(threshold_ptr + 13), tl.load(threshold_ptr + 9))
        eighth = x > tl.where(half, high, low)
        t0 = tl.where(eighth, tl.load(threshold_ptr + 2), tl.load(threshold_ptr))
        t4 = tl.where(eighth, tl.load(threshold_ptr + 6), tl.load(threshold_ptr + 4))
        t8 = tl.where(eighth, tl.load(threshold_ptr + 10), tl.load(threshold_ptr + 8))
        t12 = tl.where(eighth, tl.load(threshold_ptr + 14), tl.load(threshold_ptr + 12))
        last = x > tl.where(half, tl.where(quarter, t12, t8), tl.where(quarter, t4, t0))
        place = (half.to(tl.int32) << 3) + (quarter.to(tl.int32) << 2)
        return place + (eighth.to(tl.int32) << 1) + last.to(tl.int32)

    return _find_place_by_tree_kernel


@functools.cache
def _absmax_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _quantize_absmax_kernel(
        absmax_ptr, sum_ptr, table_ptr, code_ptr, scale_ptr, offset_ptr, num_blocks, num_sums,
        GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        place = tl.arange(0, CHUNK)
        sums = tl.zeros([CHUNK], tl.float64)
        start = 0
        while start < num_sums:
            sums += tl.load(sum_ptr + start + place, mask=start + place < num_sums, other=0.0).to(tl.float64)
            start += CHUNK
        offset = (tl.sum(sums) / num_blocks).to(tl.float32)
        if tl.program_id(0) == 0:
            tl.store(offset_ptr, offset)

        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        block = group[:, None] * 256 + tl.arange(0, 256)[None, :]
        mask = block < num_blocks
        centred = tl.where(mask, tl.load(absmax_ptr + block, mask=mask, other=0.0) - offset, 0.0)
        bits = centred.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        tl.store(scale_ptr + group, scale, mask=group * 256 < num_blocks)

        at_least = tl.where(scale > 0.0, scale, 1.0)
        scaled = centred * tl.div_rn(tl.full([GROUPS], 1.0, tl.float32), at_least)[:, None]
        scaled = tl.where(scaled > 1.0, 1.0, tl.where(scaled >= -1.0, scaled, -1.0))
        # Exact in fp64, so this is one fp32 rounding, that of a fused multiply-add.
        index = (((scaled + 1.0) * 0.5).to(tl.float64) * 65535.0 + 0.5).to(tl.float32).to(tl.int32)
        code = tl.where(scale[:, None] > 0.0, tl.load(table_ptr + index), 0)
        tl.store(code_ptr + block, code.to(tl.uint8), mask=mask)

    return _quantize_absmax_kernel
