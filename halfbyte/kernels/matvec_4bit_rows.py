"""Multiply one token, or a few of fp32, by 4-bit weights on the ordinary units of a GPU, see matvec_4bit.

A thread keeps its chunk of x in registers, in fp32, and takes it along ROWS rows; a step takes as many chunks as the
program has threads. The value of a code comes from

    codes     a load from a table of 16 values: one cache line, and an address to compute. For the interpreter
    shuffle   lane i of a warp holds value i % 16 and sends it to whoever asks: no address, and no mask, for a shuffle
              reads five bits and the table repeats after four
"""

from __future__ import annotations

import functools
from typing import Any

from halfbyte.kernels.matvec_4bit_parts import load_parts, member_parts, sum_parts


def _shuffle_text() -> str:
    """Return the assembly that looks 8 codes up in a warp: outputs 0 to 7, the lane's value, the word."""
    # Of a byte's two codes the first is the high one.
    lines = (f"shr.u32 code, $9, {4 * (i ^ 1)}; shfl.sync.idx.b32 ${i}, $8, code, 31, -1;" for i in range(8))
    return "{ .reg .b32 code; " + " ".join(lines) + " }"


@functools.cache
def _row_parts() -> Any:
    """Return what the kernel of rows is made of: x of a chunk, and a chunk's sum."""
    import triton
    import triton.language as tl

    load_text = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
    shuffle_text = tl.constexpr(_shuffle_text())
    shuffle_takes = tl.constexpr("=&f," * 8 + "f,r")

    @triton.jit
    def _load_x(x_ptr, word, X_DTYPE: tl.constexpr, LOOKUP: tl.constexpr):
        """Return the 8 elements of x that belong to each word, in fp32."""
        QUADS: tl.constexpr = X_DTYPE.primitive_bitwidth // 16
        values = (tl.zeros(word.shape, tl.float32),)
        for i in tl.static_range(QUADS):
            address = x_ptr + (word * QUADS + i) * 4
            if LOOKUP == "codes":
                quad = (tl.load(address), tl.load(address + 1), tl.load(address + 2), tl.load(address + 3))
            else:
                quad = tl.inline_asm_elementwise(
                    load_text, "=r,=r,=r,=r,l", [address.to(tl.int64)], dtype=(tl.int32,) * 4, is_pure=False, pack=1
                )
            for j in tl.static_range(4):
                if QUADS == 2:
                    values += (quad[j].to(tl.float32, bitcast=True),)  # type: ignore[assignment]
                else:
                    for k in tl.static_range(2):
                        half = (quad[j] >> (16 * k)).to(tl.int16)
                        values += (half.to(X_DTYPE, bitcast=True).to(tl.float32),)  # type: ignore[assignment]
        return values[1:]

    @triton.jit
    def _chunk_sum(packed, table, x, LOOKUP: tl.constexpr):
        """Return each chunk's sum of products."""
        if LOOKUP == "shuffle":
            values = tl.inline_asm_elementwise(
                shuffle_text, shuffle_takes, [table, packed], dtype=(tl.float32,) * 8, is_pure=False, pack=1
            )
        else:
            values = (tl.load(table + ((packed >> 4) & 15)),)
            for i in tl.static_range(1, 8):
                values += (tl.load(table + ((packed >> ((i ^ 1) * 4)) & 15)),)
        total = values[0] * x[0]
        for i in tl.static_range(1, 8):
            total = tl.fma(values[i], x[i], total)
        return tl.sum(total, axis=1)

    return _load_x, _chunk_sum


@functools.cache
def _row_step() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _load_step(
        packed_ptr, absmax_ptr, scale_ptr, first, chunk, num_rows, num_chunks,
        LOAD_ABSMAX: tl.constexpr, DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Return for each row a chunk's words, its block's absmax and that one's scale."""
        chunk = tl.minimum(chunk, num_chunks - 1)
        loaded = (first,) * ROWS
        for i in tl.static_range(ROWS):
            row = tl.minimum(first + i, num_rows - 1)
            packed = tl.load(packed_ptr + row * num_chunks * 4 + (chunk[:, None] * 4 + tl.arange(0, 4)[None, :]))
            first_block, block = row * (num_chunks // CHUNKS_PER_BLOCK), chunk // CHUNKS_PER_BLOCK
            absmax = LOAD_ABSMAX(absmax_ptr, scale_ptr, first_block, block, DOUBLE_QUANT)
            loaded += (packed, absmax[0], absmax[1])
        return loaded[ROWS:]

    @triton.jit
    def _add_step(
        sums, loaded, x_ptr, table, offset, map_ptr, at, num_chunks,
        LOOKUP: tl.constexpr, X_DTYPE: tl.constexpr, TOKENS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
        ROWS: tl.constexpr, EVEN: tl.constexpr,
        DECODE_ABSMAX: tl.constexpr, LOAD_X: tl.constexpr, CHUNK_SUM: tl.constexpr,
    ):  # fmt: skip
        """Add the products of the chunks at `at` to the sums of each token and row."""
        chunk = tl.minimum(at, num_chunks - 1)
        new_sums = sums[:0]
        for token in tl.static_range(TOKENS):
            x = LOAD_X(x_ptr, (token * num_chunks + chunk)[:, None] * 4 + tl.arange(0, 4)[None, :], X_DTYPE, LOOKUP)
            for i in tl.static_range(ROWS):
                absmax = DECODE_ABSMAX(loaded[3 * i + 1], loaded[3 * i + 2], offset, map_ptr, DOUBLE_QUANT)
                part = CHUNK_SUM(loaded[3 * i], table, x, LOOKUP)
                if not EVEN:
                    absmax = tl.where(at < num_chunks, absmax, 0.0)
                new_sums += (tl.fma(part, absmax, sums[token * ROWS + i]),)
        return new_sums

    return _load_step, _add_step


@functools.cache
def _walk_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _walk(
        loaded, x_ptr, packed_ptr, absmax_ptr, scale_ptr, first, num_rows, num_chunks, table, offset, map_ptr,
        LOOKUP: tl.constexpr, X_DTYPE: tl.constexpr, TOKENS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
        CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr,
        EVEN: tl.constexpr, LOAD_STEP: tl.constexpr, ADD_STEP: tl.constexpr, LOAD_ABSMAX: tl.constexpr,
        DECODE_ABSMAX: tl.constexpr, LOAD_X: tl.constexpr, CHUNK_SUM: tl.constexpr,
    ):  # fmt: skip
        """Return each thread's sums of each token and row; `loaded` is the first step's."""
        thread = tl.arange(0, THREADS)
        sums = (tl.zeros([THREADS], tl.float32),) * (TOKENS * ROWS)
        start = 0
        while start < num_chunks:
            next_loaded = loaded
            # A branch, for without one the assembler moves these loads down to where registers are free.
            if PREFETCH and start + THREADS < num_chunks:
                next_loaded = LOAD_STEP(
                    packed_ptr, absmax_ptr, scale_ptr, first, start + THREADS + thread, num_rows, num_chunks,
                    LOAD_ABSMAX, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
                )  # fmt: skip
            sums = ADD_STEP(
                sums, loaded, x_ptr, table, offset, map_ptr, start + thread, num_chunks,
                LOOKUP, X_DTYPE, TOKENS, DOUBLE_QUANT, ROWS, EVEN, DECODE_ABSMAX, LOAD_X, CHUNK_SUM,
            )  # fmt: skip
            start += THREADS
            if not PREFETCH:
                next_loaded = LOAD_STEP(
                    packed_ptr, absmax_ptr, scale_ptr, first, start + thread, num_rows, num_chunks,
                    LOAD_ABSMAX, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
                )  # fmt: skip
            loaded = next_loaded
        return sums

    return _walk


@functools.cache
def rows_kernel() -> tuple[Any, dict[str, Any]]:
    """Return the kernel and the functions it takes as arguments: the interpreter knows no names from around it."""
    import triton
    import triton.language as tl

    @triton.jit
    def _matvec_4bit_rows_kernel(
        x_ptr, packed_0, packed_1, packed_2, absmax_0, absmax_1, absmax_2, scale_0, scale_1, scale_2,
        offset_0, offset_1, offset_2, rows_0, rows_1, rows_2, rank_0, rank_1, rank_2,
        map_ptr, table_ptr, bias_ptr, B_ptr, u_ptr, add_ptr, out_ptr, num_chunks,
        LOOKUP: tl.constexpr, X_DTYPE: tl.constexpr, TOKENS: tl.constexpr, MEMBERS: tl.constexpr, BIAS: tl.constexpr,
        ADD: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, RANK_BLOCK: tl.constexpr,
        DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
        PREFETCH: tl.constexpr, OVERLAP: tl.constexpr, ASK_FIRST: tl.constexpr, EVEN: tl.constexpr,
        PICK: tl.constexpr, LOAD_B: tl.constexpr, LOAD_TABLE: tl.constexpr, WAIT: tl.constexpr,
        LOAD_STEP: tl.constexpr, LOAD_ABSMAX: tl.constexpr, DECODE_ABSMAX: tl.constexpr, LOAD_X: tl.constexpr,
        CHUNK_SUM: tl.constexpr, ADD_STEP: tl.constexpr, WALK: tl.constexpr, STACK: tl.constexpr,
        LOAD_TERMS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        tile, rows_before, num_rows, packed_ptr, absmax_ptr, scale_ptr, offset_ptr, first_rank = PICK(
            tl.program_id(0), ROWS, MEMBERS, (rows_0, packed_0, absmax_0, scale_0, offset_0, rank_0),
            (rows_1, packed_1, absmax_1, scale_1, offset_1, rank_1),
            (rows_2, packed_2, absmax_2, scale_2, offset_2, rank_2),
        )  # fmt: skip
        first = tile.to(tl.int64) * ROWS
        table = LOAD_TABLE(table_ptr, LOOKUP)
        offset = tl.load(offset_ptr) if DOUBLE_QUANT else 0.0
        row = first + tl.arange(0, ROWS)[:, None]
        loaded = LOAD_STEP(
            packed_ptr, absmax_ptr, scale_ptr, first, tl.arange(0, THREADS), num_rows, num_chunks,
            LOAD_ABSMAX, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
        )  # fmt: skip
        B = LOAD_B(B_ptr, first, rows_before, num_rows, ROWS, COLUMNS, RANK_BLOCK) if RANKS > 0 else 0.0
        if OVERLAP:
            WAIT(packed_ptr, first, num_rows, num_chunks, ROWS, ASK_FIRST)
        # On their way while the sums are made.
        terms = LOAD_TERMS(
            row, 0, rows_before, num_rows, first_rank, bias_ptr, u_ptr, add_ptr,
            TOKENS, 0, 1, BIAS, ADD, RANKS, COLUMNS, RANK_BLOCK,
        )  # fmt: skip
        sums = WALK(
            loaded, x_ptr, packed_ptr, absmax_ptr, scale_ptr, first, num_rows, num_chunks, table, offset, map_ptr,
            LOOKUP, X_DTYPE, TOKENS, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS, THREADS, PREFETCH, EVEN,
            LOAD_STEP, ADD_STEP, LOAD_ABSMAX, DECODE_ABSMAX, LOAD_X, CHUNK_SUM,
        )  # fmt: skip
        for token in tl.static_range(TOKENS):
            y = tl.sum(STACK(sums[token * ROWS : token * ROWS + ROWS], ROWS), axis=0)
            if token > 0:
                terms = LOAD_TERMS(
                    row, token, rows_before, num_rows, first_rank, bias_ptr, u_ptr, add_ptr,
                    TOKENS, token, token + 1, BIAS, ADD, RANKS, COLUMNS, RANK_BLOCK,
                )  # fmt: skip
            FINISH(
                y[:, None], row, token, terms, B, rows_before, num_rows, out_ptr,
                TOKENS, token, token + 1, BIAS, ADD, RANKS,
            )  # fmt: skip

    functions = (*member_parts(), *load_parts(), *sum_parts(), *_row_parts(), *_row_step(), _walk_function())
    return _matvec_4bit_rows_kernel, {function.fn.__name__[1:].upper(): function for function in functions}
