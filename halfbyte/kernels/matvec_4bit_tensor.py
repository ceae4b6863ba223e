"""Multiply a few tokens of 16 bits by a 4-bit weight with tensor cores, see matvec_4bit.

Tensor cores multiply and sum in fp32. Their A operand pairs elements next to each other along the contraction; here a
pair is one weight as the sum of two 16-bit numbers, high and low, so that a shuffle delivers it whole (within 2^-16 of
the codebook's value, relatively), and x comes twice. A warp takes 16 rows and four chunks, one for each lane of a group
of four. B has eight columns: SLOTS blocks that the four chunks may lie in, times tokens; in a column x is zero but in
the chunks of its slot, so that each accumulator belongs to one block, whose absmax multiplies it at a step's end.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from halfbyte.kernels.matvec_4bit_parts import load_parts, member_parts, sum_parts

CHUNKS_PER_MMA = 4
WEIGHTS_PER_CHUNK = 32


@functools.cache
def mma_text(dtype: torch.dtype, num_tokens: int, block_size: int) -> str:
    """Return the assembly that multiplies two words, of rows r and r + 8, by x: 8 products of 16 rows a column.

    For each group of columns 4 sums: outputs, then as many inputs, then the lane's value, the words of the two rows,
    and for each group 4 words of x.
    """
    groups = num_groups(num_tokens, block_size)
    value, words, x = 8 * groups, (8 * groups + 1, 8 * groups + 2), 8 * groups + 3
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    lines = [".reg .b32 code, a<4>, b<2>;"]
    for byte in range(4):
        for i in range(4):
            lines += [
                f"shr.u32 code, ${words[i % 2]}, {8 * byte + 4 * (i < 2)};",
                f"shfl.sync.idx.b32 a{i}, ${value}, code, 31, -1;",
            ]
        for group in range(groups):
            sums = [f"${4 * group + i}" for i in range(4)]
            added = sums if byte else [f"${4 * (groups + group) + i}" for i in range(4)]
            pair = f"${x + 4 * group + byte}"
            lines += [
                f"prmt.b32 b0, {pair}, 0, 0x1010; prmt.b32 b1, {pair}, 0, 0x3232;",
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
                f"{{{', '.join(sums)}}}, {{a0, a1, a2, a3}}, {{b0, b1}}, {{{', '.join(added)}}};",
            ]
    return "{ " + " ".join(lines) + " }"


def num_groups(num_tokens: int, block_size: int) -> int:
    """Return how many times the eight columns of B are needed, a power of two."""
    slots = max(1, CHUNKS_PER_MMA * WEIGHTS_PER_CHUNK // block_size)
    return 1 << (-(-num_tokens * slots // 8) - 1).bit_length()


@functools.cache
def _tensor_parts() -> Any:
    """Return what the kernel of tensor cores is made of; everything is one element a thread."""
    import triton
    import triton.language as tl

    load_text = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
    zero_text = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    masked_text = tl.constexpr(
        "{ .reg .pred on; setp.ne.b32 on, $5, 0; " + zero_text + " @on ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )

    @triton.jit
    def _pair_values(value, X_DTYPE: tl.constexpr):
        """Return a number as two of 16 bits that sum to it, the larger one in the low half of a word."""
        high = value.to(X_DTYPE)
        low = (value - high.to(tl.float32)).to(X_DTYPE)
        return (high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (
            low.to(tl.int16, bitcast=True).to(tl.int32) << 16
        )

    @triton.jit
    def _load_words(address, mask):
        if mask is None:
            words = tl.inline_asm_elementwise(
                load_text, "=r,=r,=r,=r,l", [address.to(tl.int64)], dtype=(tl.int32,) * 4, is_pure=False, pack=1
            )
        else:
            words = tl.inline_asm_elementwise(
                masked_text, "=&r,=&r,=&r,=&r,l,r", [address.to(tl.int64), mask.to(tl.int32)],
                dtype=(tl.int32,) * 4, is_pure=False, pack=1,
            )  # fmt: skip
        return words

    @triton.jit
    def _multiply(sums, table, above, below, word: tl.constexpr, x, LOOKUP: tl.constexpr, GROUPS: tl.constexpr):
        """Add the products of a word of two rows to each group's sums."""
        arguments = sums + (table, above[word], below[word])  # noqa: RUF005
        for group in tl.static_range(GROUPS):
            for i in tl.static_range(4):
                arguments += (x[(group * 4 + word) * 4 + i],)
        takes: tl.constexpr = "=&f," * (4 * GROUPS) + "f," * (4 * GROUPS) + "r,r" + ",r" * (4 * GROUPS + 1)
        return tl.inline_asm_elementwise(
            LOOKUP, takes, arguments, dtype=(tl.float32,) * (4 * GROUPS), is_pure=False, pack=1
        )

    return _pair_values, _load_words, _multiply


@functools.cache
def _step_parts() -> Any:
    """Return what a step does: load what the next one works on, of the weight and of x, and work."""
    import triton
    import triton.language as tl

    *_, _load_absmax, _decode_absmax = load_parts()
    _, _load_words, _multiply = _tensor_parts()

    @triton.jit
    def _load_weight(
        packed_ptr, absmax_ptr, scale_ptr, row, chunk, slot_chunk, num_rows, num_chunks,
        DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Return for each eighth row a chunk's words, the absmax of the sums' block, and its scale."""
        loaded = (row,) * ROWS
        for i in tl.static_range(ROWS // 8):
            at = tl.minimum(row + 8 * i, num_rows - 1)
            first = at * (num_chunks // CHUNKS_PER_BLOCK)
            block = tl.minimum(slot_chunk, num_chunks - 1) // CHUNKS_PER_BLOCK
            absmax = _load_absmax(absmax_ptr, scale_ptr, first, block, DOUBLE_QUANT)
            words = _load_words(packed_ptr + at * num_chunks * 4 + tl.minimum(chunk, num_chunks - 1) * 4, None)
            loaded += (words, absmax[0], absmax[1])
        return loaded[ROWS:]

    @triton.jit
    def _load_x(
        x_ptr, column, quad, chunk, num_chunks, SLOTS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr
    ):
        """Return the words of x, four of four for each group of columns."""
        x = (quad,) * GROUPS
        for group in tl.static_range(GROUPS):
            token = group * (8 // SLOTS) + column % (8 // SLOTS)
            mask = (quad * SLOTS // 4 == column // (8 // SLOTS)) & (token < TOKENS) & (chunk < num_chunks)
            for word in tl.static_range(4):
                x += _load_words(x_ptr + (token * num_chunks + chunk) * 16 + word * 4, mask)
        return x[GROUPS:]

    @triton.jit
    def _add_step(
        sums, loaded, x, table, offset, map_ptr,
        LOOKUP: tl.constexpr, DOUBLE_QUANT: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        new_sums = sums[:0]
        for tile in tl.static_range(ROWS // 16):
            parts = (tl.zeros(table.shape, tl.float32),) * (4 * GROUPS)
            for word in tl.static_range(4):
                parts = _multiply(parts, table, loaded[6 * tile], loaded[6 * tile + 3], word, x, LOOKUP, GROUPS)
            above = _decode_absmax(loaded[6 * tile + 1], loaded[6 * tile + 2], offset, map_ptr, DOUBLE_QUANT)
            below = _decode_absmax(loaded[6 * tile + 4], loaded[6 * tile + 5], offset, map_ptr, DOUBLE_QUANT)
            for i in tl.static_range(4 * GROUPS):
                scale = above if i % 4 < 2 else below
                new_sums += (tl.fma(parts[i], scale, sums[tile * 4 * GROUPS + i]),)
        return new_sums

    return _load_weight, _load_x, _add_step


@functools.cache
def _walk_function() -> Any:
    import triton
    import triton.language as tl

    _load_weight, _load_x, _add_step = _step_parts()

    @triton.jit
    def _walk(
        loaded, x_ptr, packed_ptr, absmax_ptr, scale_ptr, row, column, quad, chunk, slot_chunk, num_rows, num_chunks,
        table, offset, map_ptr,
        LOOKUP: tl.constexpr, DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr,
        THREADS: tl.constexpr, PREFETCH: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        """Return each thread's sums; `loaded` is what the first step works on, of the weight."""
        STEP: tl.constexpr = THREADS // 8
        sums = (tl.zeros([THREADS], tl.float32),) * (4 * GROUPS * (ROWS // 16))
        x = _load_x(x_ptr, column, quad, chunk, num_chunks, SLOTS, TOKENS, GROUPS)
        start = 0
        while start < num_chunks:
            next_loaded, next_x = loaded, x
            # A branch, for without one the assembler moves these loads down to where registers are free.
            if PREFETCH and start + STEP < num_chunks:
                next_loaded = _load_weight(
                    packed_ptr, absmax_ptr, scale_ptr, row, start + STEP + chunk, start + STEP + slot_chunk,
                    num_rows, num_chunks, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
                )  # fmt: skip
                next_x = _load_x(x_ptr, column, quad, start + STEP + chunk, num_chunks, SLOTS, TOKENS, GROUPS)
            sums = _add_step(sums, loaded, x, table, offset, map_ptr, LOOKUP, DOUBLE_QUANT, GROUPS, ROWS)
            start += STEP
            if not PREFETCH:
                next_loaded = _load_weight(
                    packed_ptr, absmax_ptr, scale_ptr, row, start + chunk, start + slot_chunk,
                    num_rows, num_chunks, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
                )  # fmt: skip
                next_x = _load_x(x_ptr, column, quad, start + chunk, num_chunks, SLOTS, TOKENS, GROUPS)
            loaded, x = next_loaded, next_x
        return sums

    return _walk


@functools.cache
def tensor_kernel() -> Any:
    import triton
    import triton.language as tl

    _pick, _load_B = member_parts()
    _, _wait, *_ = load_parts()
    _stack, _load_terms, _finish = sum_parts()
    _load_weight, *_ = _step_parts()
    _walk = _walk_function()
    _pair_values, *_ = _tensor_parts()

    @triton.jit
    def _matvec_4bit_tensor_kernel(
        x_ptr, packed_0, packed_1, packed_2, absmax_0, absmax_1, absmax_2, scale_0, scale_1, scale_2,
        offset_0, offset_1, offset_2, rows_0, rows_1, rows_2, rank_0, rank_1, rank_2,
        map_ptr, table_ptr, bias_ptr, B_ptr, u_ptr, add_ptr, out_ptr, num_chunks,
        LOOKUP: tl.constexpr, X_DTYPE: tl.constexpr, TOKENS: tl.constexpr, MEMBERS: tl.constexpr, BIAS: tl.constexpr,
        ADD: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, RANK_BLOCK: tl.constexpr,
        DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
        PREFETCH: tl.constexpr, OVERLAP: tl.constexpr, ASK_FIRST: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        SLOTS: tl.constexpr = max(1, 4 // CHUNKS_PER_BLOCK)
        PER_SLOT: tl.constexpr = 8 // SLOTS
        tile, rows_before, num_rows, packed_ptr, absmax_ptr, scale_ptr, offset_ptr, first_rank = _pick(
            tl.program_id(0), ROWS, MEMBERS, (rows_0, packed_0, absmax_0, scale_0, offset_0, rank_0),
            (rows_1, packed_1, absmax_1, scale_1, offset_1, rank_1),
            (rows_2, packed_2, absmax_2, scale_2, offset_2, rank_2),
        )  # fmt: skip
        thread = tl.arange(0, THREADS)
        quad, column, chunk = thread % 4, thread % 32 // 4, thread // 32 * 4 + thread % 4
        first = tile.to(tl.int64) * ROWS
        row = first + column
        table = _pair_values(tl.load(table_ptr + thread % 16), X_DTYPE)
        offset = tl.load(offset_ptr) if DOUBLE_QUANT else 0.0
        slot_chunk = chunk - quad + quad * SLOTS // 4 * CHUNKS_PER_BLOCK
        loaded = _load_weight(
            packed_ptr, absmax_ptr, scale_ptr, row, chunk, slot_chunk, num_rows, num_chunks,
            DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
        )  # fmt: skip
        B = _load_B(B_ptr, first, rows_before, num_rows, ROWS, COLUMNS, RANK_BLOCK) if RANKS > 0 else 0.0
        if OVERLAP:
            _wait(packed_ptr, first, num_rows, num_chunks, ROWS, ASK_FIRST)
        sums = _walk(
            loaded, x_ptr, packed_ptr, absmax_ptr, scale_ptr, row, column, quad, chunk, slot_chunk, num_rows,
            num_chunks, table, offset, map_ptr,
            LOOKUP, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS, THREADS, PREFETCH, SLOTS, TOKENS, GROUPS,
        )  # fmt: skip
        rows, tokens = (first + tl.arange(0, ROWS))[:, None], tl.arange(0, GROUPS * PER_SLOT)[None, :]
        terms = _load_terms(
            rows, tokens, rows_before, num_rows, first_rank, bias_ptr, u_ptr, add_ptr,
            TOKENS, 0, TOKENS, BIAS, ADD, RANKS, COLUMNS, RANK_BLOCK,
        )  # fmt: skip
        NUM: tl.constexpr = GROUPS * (ROWS // 4)
        y = tl.reshape(_stack(sums, NUM), [THREADS // 32, 8, SLOTS, PER_SLOT // 2, NUM])
        y = tl.reshape(tl.sum(tl.sum(y, axis=2), axis=0), [8, PER_SLOT // 2, ROWS // 16, GROUPS, 2, 2])
        # A row is tile, half, column; a token is group, pair, which of the pair.
        y = tl.reshape(tl.permute(y, (2, 4, 0, 3, 1, 5)), [ROWS, GROUPS * PER_SLOT])
        _finish(y, rows, tokens, terms, B, rows_before, num_rows, out_ptr, TOKENS, 0, TOKENS, BIAS, ADD, RANKS)

    return _matvec_4bit_tensor_kernel
