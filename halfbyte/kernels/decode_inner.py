"""What comes between two products of one new token on a GPU, and the adapters' inner product of it, in one launch.

A program takes one rank for one token and reads the token's whole row: a few KB that lie in the cache. All programs do
the elementwise work again, for reading A is what takes time; the first one writes the result. A norm's factor is
multiplied to the sums at the end, so that one pass gives it and them, and one exchange between the threads.

A row of up to MAX_BLOCK stays in registers, all of its loads under way at once; longer ones go in steps. A gated
product without ranks has nothing to sum and is spread over programs. With overlap, see matvec_4bit, A and the norm's
weight are loaded while the kernels before still run.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from halfbyte.kernels.launch import launch

MAX_BLOCK = 16384
SPREAD_BLOCK = 1024
ELEMENTS_PER_THREAD, MAX_WARPS = 8, 16

Kind = Literal["plain", "norm", "gated"]

# T tokens, D features, R ranks


def decode_inner(
    kind: Kind,
    x_TD: torch.Tensor,
    other: torch.Tensor,
    A_RD: torch.Tensor,
    scale_R: torch.Tensor,
    out_TD: torch.Tensor,
    u_TR: torch.Tensor,
    *,
    eps: float,
    overlap: bool,
) -> None:
    """Write f(x) to `out_TD` and s A f(x) to `u_TR`.

    Args:
        kind: What f is; "plain" writes no `out_TD`.
        x_TD: Rows of any stride; the gate of "gated".
        other: The weight of a norm, (D,); of "gated" what is multiplied by the gate, of the shape of x.
        A_RD: Contiguous, or without rows.
        scale_R: fp32.
        out_TD: Contiguous.
        u_TR: fp32, contiguous.
        eps: Of a norm.
        overlap: Whether it may start while kernels before it still run.
    """
    num_tokens, width = x_TD.shape
    ranks = A_RD.shape[0]
    spread = kind == "gated" and not ranks
    block = min(SPREAD_BLOCK if spread else MAX_BLOCK, 1 << (width - 1).bit_length())
    tiles = -(-width // block) if spread else max(ranks, 1)
    launch(
        _row_kernel() if spread or width <= block else _long_row_kernel(),
        num_tokens * tiles,
        x_TD,
        other,
        A_RD if ranks else x_TD,
        scale_R if ranks else x_TD,
        out_TD,
        u_TR if ranks else out_TD,
        x_TD.stride(0),
        other.stride(0),
        width,
        eps,
        KIND=kind,
        RANKS=ranks,
        TILES=tiles,
        SPREAD=spread,
        BLOCK=block,
        OVERLAP=overlap,
        num_warps=max(1, min(MAX_WARPS, block // (32 * ELEMENTS_PER_THREAD))),
    )


@functools.cache
def _row_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _decode_inner_kernel(
        x_ptr, other_ptr, A_ptr, scale_ptr, out_ptr, u_ptr, x_stride, other_stride, width, eps,
        KIND: tl.constexpr, RANKS: tl.constexpr, TILES: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        token = (tl.program_id(0) // TILES).to(tl.int64)
        tile = tl.program_id(0) % TILES
        column = tl.arange(0, BLOCK)
        if SPREAD:
            column += tile * BLOCK
        mask = column < width
        if RANKS > 0:
            A = tl.load(A_ptr + tile.to(tl.int64) * width + column, mask=mask, other=0)
            scale = tl.load(scale_ptr + tile)
        if KIND == "norm":
            weight = tl.load(other_ptr + column, mask=mask, other=0)
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

        y = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0).to(tl.float32)
        if KIND == "gated":
            up = tl.load(other_ptr + token * other_stride + column, mask=mask, other=0).to(tl.float32)
            y = y / (1.0 + tl.exp(-y)) * up
        if KIND == "norm":
            squares = y * y
            y *= weight.to(tl.float32)
            if RANKS > 0:
                total, u = tl.split(tl.sum(tl.join(squares, A.to(tl.float32) * y), axis=0))
            else:
                total = tl.sum(squares, axis=0)
            r = tl.rsqrt(total / width + eps)
            y *= r
            if RANKS > 0:
                u *= r
        elif RANKS > 0:
            u = tl.sum(A.to(tl.float32) * y, axis=0)
        if RANKS > 0:
            tl.store(u_ptr + token * RANKS + tile, u * scale)
        if KIND != "plain":
            if not SPREAD:
                mask &= tile == 0
            tl.store(out_ptr + token * width + column, y.to(out_ptr.dtype.element_ty), mask=mask)

    return _decode_inner_kernel


@functools.cache
def _long_row_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _decode_inner_long_kernel(
        x_ptr, other_ptr, A_ptr, scale_ptr, out_ptr, u_ptr, x_stride, other_stride, width, eps,
        KIND: tl.constexpr, RANKS: tl.constexpr, TILES: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = (tl.program_id(0) // TILES).to(tl.int64)
        tile = tl.program_id(0) % TILES
        x_ptr += token * x_stride
        out_ptr += token * width
        if KIND == "gated":
            other_ptr += token * other_stride
        A_ptr += tile.to(tl.int64) * width
        sums = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        column = tl.arange(0, BLOCK)
        start = 0
        while start < width:
            mask = start + column < width
            y = tl.load(x_ptr + start + column, mask=mask, other=0).to(tl.float32)
            if KIND == "norm":
                squares += y * y
                y *= tl.load(other_ptr + start + column, mask=mask, other=0).to(tl.float32)
            if KIND == "gated":
                up = tl.load(other_ptr + start + column, mask=mask, other=0).to(tl.float32)
                y = y / (1.0 + tl.exp(-y)) * up
                is_mine = start // BLOCK % TILES == tile
                tl.store(out_ptr + start + column, y.to(out_ptr.dtype.element_ty), mask=mask & is_mine)
            if RANKS > 0:
                sums += y * tl.load(A_ptr + start + column, mask=mask, other=0).to(tl.float32)
            start += BLOCK

        u = tl.sum(sums, axis=0)
        if KIND == "norm":
            r = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
            u *= r
            start = tile * BLOCK
            while start < width:
                mask = start + column < width
                x = tl.load(x_ptr + start + column, mask=mask, other=0).to(tl.float32)
                weight = tl.load(other_ptr + start + column, mask=mask, other=0).to(tl.float32)
                tl.store(out_ptr + start + column, (x * r * weight).to(out_ptr.dtype.element_ty), mask=mask)
                start += TILES * BLOCK
        if RANKS > 0:
            tl.store(u_ptr + token * RANKS + tile, u * tl.load(scale_ptr + tile))

    return _decode_inner_long_kernel
