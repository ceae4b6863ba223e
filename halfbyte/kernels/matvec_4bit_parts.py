"""What both kernels that multiply a few tokens by 4-bit weights are made of, see matvec_4bit."""

from __future__ import annotations

import functools
from typing import Any


def _show_language() -> None:
    """Put the language among this file's globals, where the interpreter looks when a kernel of another file calls."""
    import triton.language

    globals()["tl"] = triton.language


@functools.cache
def member_parts() -> Any:
    """Return how both kernels find their member, and their part of B."""
    import triton
    import triton.language as tl

    _show_language()

    @triton.jit
    def _pick(program, ROWS: tl.constexpr, MEMBERS: tl.constexpr, first, second, third):
        """Return of what is given of each member, its number of rows first, that of the program's.

        In front: the tile of rows, and the rows of members before it.
        """
        tile, rows_before, picked = program, program * 0, first
        for member in tl.static_range(1, MEMBERS):
            following = second if member == 1 else third
            tiles = (picked[0] + ROWS - 1) // ROWS
            is_next = tile >= tiles
            rows_before = tl.where(is_next, rows_before + picked[0], rows_before)
            tile = tl.where(is_next, tile - tiles, tile)
            chosen = (tile, rows_before)
            for i in tl.static_range(len(first)):
                chosen += (tl.where(is_next, following[i], picked[i]),)  # type: ignore[assignment]
            picked = chosen[2:]
        return (tile, rows_before) + picked  # noqa: RUF005

    @triton.jit
    def _load_B(
        B_ptr, first_row, rows_before, num_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK_BLOCK: tl.constexpr
    ):
        row, column = first_row + tl.arange(0, ROWS)[:, None], tl.arange(0, RANK_BLOCK)[None, :]
        mask = (row < num_rows) & (column < COLUMNS)
        return tl.load(B_ptr + (rows_before + row) * COLUMNS + column, mask=mask, other=0)

    return _pick, _load_B


@functools.cache
def load_parts() -> Any:
    """Return how both kernels load: a thread's table, words into the cache, and scales of blocks."""
    import triton
    import triton.language as tl

    ask_text = tl.constexpr(
        "{ .reg .pred one; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 one, thread, 0; mov.b32 $0, 0; "
        "@one cp.async.bulk.prefetch.L2.global [$1], $2; }"
    )

    @triton.jit
    def _load_table(table_ptr, LOOKUP: tl.constexpr):
        if LOOKUP == "codes":
            return table_ptr
        else:
            lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            return tl.load(table_ptr + (lane & 15))

    @triton.jit
    def _wait(packed_ptr, first, num_rows, num_chunks, ROWS: tl.constexpr, ASK_FIRST: tl.constexpr):
        """Let what follows start, and wait for what came before, with all words on their way if they are asked for."""
        tl.extra.cuda.gdc_launch_dependents()
        if ASK_FIRST:
            # One thread asks.
            size = (tl.minimum(num_rows - first, ROWS) * num_chunks * 16).to(tl.int32)
            address = (packed_ptr + first * num_chunks * 4).to(tl.int64)
            tl.inline_asm_elementwise(ask_text, "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)
        tl.extra.cuda.gdc_wait()

    @triton.jit
    def _load_absmax(absmax_ptr, scale_ptr, first, block, DOUBLE_QUANT: tl.constexpr):
        """Return the absmax of blocks `first + block`, a 64-bit number and small ones, and their groups' scales."""
        absmax = tl.load(absmax_ptr + first + block)
        if DOUBLE_QUANT:
            scale = tl.load(scale_ptr + (first >> 8) + (((first & 255).to(tl.int32) + block) >> 8))
        else:
            scale = absmax
        return absmax, scale

    @triton.jit
    def _decode_absmax(absmax, scale, offset, map_ptr, DOUBLE_QUANT: tl.constexpr):
        if DOUBLE_QUANT:
            absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + offset
        return absmax

    return _load_table, _wait, _load_absmax, _decode_absmax


@functools.cache
def sum_parts() -> Any:
    """Return what both kernels do with sums."""
    import triton
    import triton.language as tl

    @triton.jit
    def _stack(tensors, NUM: tl.constexpr):
        """Return a power of two of tensors as one, in a new last axis."""
        size: tl.constexpr = tensors[0].shape[0]
        for _ in tl.static_range(5):
            if len(tensors) > 1:
                stacked = (tl.join(tensors[0], tensors[len(tensors) // 2]),)
                for i in tl.static_range(1, len(tensors) // 2):
                    stacked += (tl.join(tensors[i], tensors[len(tensors) // 2 + i]),)  # type: ignore[assignment]
                tensors = stacked
        return tl.reshape(tensors[0], [size, NUM])

    @triton.jit
    def _load_terms(
        row, token, rows_before, num_rows, first_rank, bias_ptr, u_ptr, add_ptr,
        TOKENS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
        RANKS: tl.constexpr, COLUMNS: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Return bias and addend of y [rows, tokens FROM to TO], and u of each token."""
        terms = (0.0, 0.0)
        if BIAS:
            terms = (tl.load(bias_ptr + rows_before + row, mask=row < num_rows, other=0), 0.0)
        if ADD:
            mask = (row < num_rows) & (token < TOKENS)
            add = tl.load(add_ptr + rows_before * TOKENS + token * num_rows + row, mask=mask, other=0)
            terms = (terms[0], add)
        if RANKS > 0:
            column = tl.arange(0, RANK_BLOCK)
            u_mask = (column < COLUMNS) & (first_rank + column < RANKS)
            for i in tl.static_range(FROM, TO):
                u = tl.load(u_ptr + i * RANKS + first_rank + column, mask=u_mask, other=0)
                terms += (u,)  # type: ignore[assignment]
        return terms

    @triton.jit
    def _finish(
        y, row, token, terms, B, rows_before, num_rows, out_ptr,
        TOKENS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
        RANKS: tl.constexpr,
    ):  # fmt: skip
        """Add the terms and B u to y, and store it."""
        if RANKS > 0:
            for i in tl.static_range(FROM, TO):
                part = tl.sum(B.to(tl.float32) * terms[2 + i - FROM][None, :], axis=1)
                y += tl.where(token == i, part[:, None], 0.0)
        if BIAS:
            y += terms[0].to(tl.float32)
        if ADD:
            y += terms[1].to(tl.float32)
        mask = (row < num_rows) & (token < TOKENS)
        out = rows_before * TOKENS + token * num_rows + row
        tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=mask)

    return _stack, _load_terms, _finish
