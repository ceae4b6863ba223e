"""The adapters' outer product of a few new tokens on a GPU, for all projections of a group in one launch.

A program takes a tile of rows of one projection; a table says which, and where its ranks start. B's rows are read
once, for all tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from halfbyte.kernels.launch import launch

ROWS_PER_PROGRAM = 32

# T tokens, F out_features of a group, R ranks of a group, M the most ranks of one projection


def make_tiles(widths: list[int], first_ranks: list[int], device: torch.device) -> torch.Tensor:
    """Return the table, int32 (tiles, 4): a tile's first row, its projection's first row, end and first rank."""
    tiles, start = [], 0
    for width, first_rank in zip(widths, first_ranks, strict=True):
        end = start + width
        tiles += [(row, start, end, first_rank) for row in range(start, end, ROWS_PER_PROGRAM)]
        start = end
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def decode_outer(
    u_TR: torch.Tensor, B_FM: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor, *, residual: torch.Tensor | None
) -> None:
    """Write each projection's (T, width), one after another, to the flat `out`, fp32; all contiguous."""
    launch(
        _kernel(),
        tiles.shape[0],
        u_TR,
        B_FM,
        tiles,
        out if residual is None else residual,
        out,
        TOKENS=u_TR.shape[0],
        RANKS=u_TR.shape[1],
        COLUMNS=B_FM.shape[1],
        BLOCK=1 << (B_FM.shape[1] - 1).bit_length(),
        ROWS=ROWS_PER_PROGRAM,
        RESIDUAL=residual is not None,
        num_warps=2,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _decode_outer_kernel(
        u_ptr, B_ptr, tile_ptr, residual_ptr, out_ptr,
        TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
        RESIDUAL: tl.constexpr,
    ):  # fmt: skip
        tile_ptr += tl.program_id(0) * 4
        row = tl.load(tile_ptr) + tl.arange(0, ROWS)
        start = tl.load(tile_ptr + 1)
        end = tl.load(tile_ptr + 2)
        first_rank = tl.load(tile_ptr + 3)
        column = tl.arange(0, BLOCK)
        mask = (row < end)[:, None] & (column < COLUMNS)[None, :]
        B = tl.load(B_ptr + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=mask, other=0).to(tl.float32)
        # An adapter with fewer ranks than its neighbours has zeros in B there.
        u_mask = (column < COLUMNS) & (first_rank + column < RANKS)
        place = start * TOKENS + row - start
        for token in tl.static_range(TOKENS):
            u = tl.load(u_ptr + token * RANKS + first_rank + column, mask=u_mask, other=0)
            y = tl.sum(B * u[None, :], axis=1)
            out_place = place + token * (end - start)
            if RESIDUAL:
                y += tl.load(residual_ptr + out_place, mask=row < end, other=0).to(tl.float32)
            tl.store(out_ptr + out_place, y, mask=row < end)

    return _decode_outer_kernel
