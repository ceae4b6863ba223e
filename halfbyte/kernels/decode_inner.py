"""What comes between two products of one new token on a GPU, and the adapters' inner product of it, in one launch.

A program takes a tile of ranks for one token and reads the token's whole row: a few KB that lie in the cache. All
programs do the elementwise work again, for reading A is what takes time, and each writes its share of the columns. A
norm's factor is multiplied to the sums at the end, so that one pass gives it and them.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from halfbyte.kernels.launch import launch

MAX_BLOCK = 4096
ELEMENTS_PER_THREAD = 16
RANKS_PER_PROGRAM = 1

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
    """
    num_tokens, width = x_TD.shape
    ranks = A_RD.shape[0]
    block = min(MAX_BLOCK, 1 << (width - 1).bit_length())
    tiles = -(-ranks // RANKS_PER_PROGRAM) if ranks else -(-width // block)
    launch(
        _kernel(),
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
        ROWS=RANKS_PER_PROGRAM,
        TILES=tiles,
        BLOCK=block,
        num_warps=max(1, block // (32 * ELEMENTS_PER_THREAD)),
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _decode_inner_kernel(
        x_ptr, other_ptr, A_ptr, scale_ptr, out_ptr, u_ptr, x_stride, other_stride, width, eps,
        KIND: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = (tl.program_id(0) // TILES).to(tl.int64)
        tile = tl.program_id(0) % TILES
        x_ptr += token * x_stride
        out_ptr += token * width
        if KIND == "gated":
            other_ptr += token * other_stride
        rank = tile * ROWS + tl.arange(0, ROWS)
        A_row = A_ptr + rank.to(tl.int64)[:, None] * width
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
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
                A_mask = (rank < RANKS)[:, None] & mask[None, :]
                A = tl.load(A_row + start + column[None, :], mask=A_mask, other=0).to(tl.float32)
                sums += A * y[None, :]
            start += BLOCK

        u = tl.sum(sums, axis=1)
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
            u *= tl.load(scale_ptr + rank, mask=rank < RANKS, other=0)
            tl.store(u_ptr + token * RANKS + rank, u, mask=rank < RANKS)

    return _decode_inner_kernel
