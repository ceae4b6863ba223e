"""Multiply a few tokens by a 4-bit weight on a GPU without writing the weight out: what decoding waits for.

    y[t, f] = sum_block absmax[f, block] * sum_(d in block) codebook[code[f, d]] * x[t, d]  (+ bias[f] + add[t, f])

One program takes a tile of [CHUNKS, ROWS, 4] words of the packed weight and walks along the contraction. A chunk is 32
weights, four words of 32 bits: one 16-byte load of one thread, and within one block, whose absmax multiplies the
chunk's sum once. Sums stay with their thread until the end, so nothing but x changes threads on the way. Nothing is
added atomically: the same input gives the same bytes.

Reading 0.5 bytes a weight, the work is as much in looking up codes as in memory. Two ways to look up:

    codes     a load from a table of 16 values: one cache line, and an address to compute
    shuffle   lane i of a warp holds value i % 16 and sends it to whoever asks: no address, and no mask, for a shuffle
              reads five bits and the table repeats after four

x is read in words of 8 bytes, four elements of 16 bits or two of 32, and becomes fp32 at once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch

WEIGHTS_PER_CHUNK = 32


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecLaunch:
    """How the kernel is launched. It changes the result only by the order of fp32 sums."""

    lookup: Literal["codes", "shuffle"] = "shuffle"
    """Where the value of a code comes from. The interpreter knows no shuffle."""
    rows_per_program: int = 4
    chunks_per_step: int = 128
    """Chunks of a row that a program takes at a time; 32 keep one warp busy."""
    num_warps: int = 4


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecWeight:
    """The tensors of a 4-bit weight, (out_features, in_features)."""

    packed: torch.Tensor
    absmax: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    dynamic_map: torch.Tensor
    codebook: torch.Tensor
    block_size: int


def matvec_4bit(
    x: torch.Tensor,
    weight: MatvecWeight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    launch: MatvecLaunch,
) -> None:
    """Write the product to `out`.

    Args:
        x: (tokens, in_features), fp32, fp16 or bf16, contiguous, 8-byte aligned; in_features a multiple of block_size.
        weight: Its packed bytes 4-byte aligned; loads are 16 bytes wide where they are 16-byte aligned.
        out: (tokens, out_features), contiguous.
        bias: (out_features,), contiguous, or None.
        add: (tokens, out_features), contiguous, or None.
        launch: How to launch.
    """
    num_rows, num_chunks = out.shape[1], x.shape[1] // WEIGHTS_PER_CHUNK
    rows = launch.rows_per_program
    chunks = min(launch.chunks_per_step, 1 << (num_chunks - 1).bit_length())
    kernel = _kernel()
    with torch.cuda.device_of(out):
        kernel[(-(-num_rows // rows),)](
            x.view(-1).view(torch.int64),
            weight.packed.view(torch.int32),
            weight.absmax,
            weight.absmax if weight.scale is None else weight.scale,
            weight.absmax if weight.offset is None else weight.offset,
            weight.dynamic_map,
            weight.codebook,
            out if bias is None else bias,
            out if add is None else add,
            out,
            num_rows,
            num_chunks,
            PRODUCT=_product_of_words(),
            LOOKUP=launch.lookup,
            X_DTYPE=_triton_dtype(x.dtype),
            TOKENS=x.shape[0],
            BIAS=bias is not None,
            ADD=add is not None,
            DOUBLE_QUANT=weight.scale is not None,
            CHUNKS_PER_BLOCK=weight.block_size // WEIGHTS_PER_CHUNK,
            ROWS=rows,
            CHUNKS=chunks,
            num_warps=launch.num_warps,
        )


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@functools.cache
def _product_of_words() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _product(
        packed, table_ptr, lane_value, x_ptr, x_offset, x_mask, x_stride,
        LOOKUP: tl.constexpr, X_DTYPE: tl.constexpr, TOKENS: tl.constexpr,
    ):  # fmt: skip
        """Return for each token [CHUNKS, ROWS, 4], the sums of the 8 products in each word."""
        ELEMENTS: tl.constexpr = 64 // X_DTYPE.primitive_bitwidth
        sums = (tl.zeros(packed.shape, tl.float32),) * TOKENS
        for word in tl.static_range(8 // ELEMENTS):
            # Of no length yet, but of a type.
            values = sums[:0]
            for i in tl.static_range(ELEMENTS):
                # Of a byte's two codes the first is the high one.
                code = packed >> (((word * ELEMENTS + i) ^ 1) * 4)
                if LOOKUP == "shuffle":
                    value = tl.inline_asm_elementwise(
                        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;",
                        "=f,f,r",
                        [lane_value, code],
                        dtype=tl.float32,
                        is_pure=False,
                        pack=1,
                    )
                else:
                    value = tl.load(table_ptr + (code & 15))
                values += (value,)
            new_sums = sums[:0]
            for token in tl.static_range(TOKENS):
                x_word = tl.load(x_ptr + token * x_stride + x_offset * (8 // ELEMENTS) + word, mask=x_mask, other=0)
                total = sums[token]
                for i in tl.static_range(ELEMENTS):
                    if ELEMENTS == 4:
                        x = (x_word >> (16 * i)).to(tl.int16).to(X_DTYPE, bitcast=True).to(tl.float32)
                    else:
                        x = (x_word >> (32 * i)).to(tl.int32).to(tl.float32, bitcast=True)
                    total += values[i] * x
                new_sums += (total,)
            sums = new_sums
        return sums

    return _product


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _matvec_4bit_kernel(
        x_ptr, packed_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, table_ptr, bias_ptr, add_ptr, out_ptr,
        num_rows, num_chunks,
        PRODUCT: tl.constexpr, LOOKUP: tl.constexpr, X_DTYPE: tl.constexpr, TOKENS: tl.constexpr,
        BIAS: tl.constexpr, ADD: tl.constexpr, DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr,
        ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    ):  # fmt: skip
        # Addresses: a 64-bit scalar for the tile, 32-bit offsets inside it.
        first = tl.program_id(0).to(tl.int64) * ROWS
        row = tl.arange(0, ROWS)
        row_mask = first + row < num_rows
        word = tl.arange(0, 4)[None, None, :]
        lane_value = 0.0
        if LOOKUP == "shuffle":
            lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            lane_value = tl.load(table_ptr + (lane & 15))
        if DOUBLE_QUANT:
            absmax_offset = tl.load(offset_ptr)

        sums = (tl.zeros([CHUNKS, ROWS], tl.float32),) * TOKENS
        start = 0
        while start < num_chunks:
            chunk = start + tl.arange(0, CHUNKS)
            chunk_mask = chunk < num_chunks
            mask = chunk_mask[:, None] & row_mask[None, :]
            in_tile = chunk[:, None] + row[None, :] * num_chunks
            packed = tl.load(
                packed_ptr + first * num_chunks * 4 + (in_tile[:, :, None] * 4 + word), mask=mask[:, :, None], other=0
            )
            block = (first * num_chunks + in_tile) // CHUNKS_PER_BLOCK
            absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
            if DOUBLE_QUANT:
                scale = tl.load(scale_ptr + block // 256, mask=mask, other=0)
                absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + absmax_offset

            products = PRODUCT(
                packed, table_ptr, lane_value, x_ptr, chunk[:, None, None] * 4 + word, chunk_mask[:, None, None],
                num_chunks * (X_DTYPE.primitive_bitwidth // 2), LOOKUP, X_DTYPE, TOKENS,
            )  # fmt: skip
            new_sums = sums[:0]
            for token in tl.static_range(TOKENS):
                new_sums += (sums[token] + tl.sum(products[token], axis=2) * absmax,)
            sums = new_sums
            start += CHUNKS

        for token in tl.static_range(TOKENS):
            y = tl.sum(sums[token], axis=0)
            out = token * num_rows + first + row
            if BIAS:
                y += tl.load(bias_ptr + first + row, mask=row_mask, other=0).to(tl.float32)
            if ADD:
                y += tl.load(add_ptr + out, mask=row_mask, other=0).to(tl.float32)
            tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=row_mask)

    return _matvec_4bit_kernel
