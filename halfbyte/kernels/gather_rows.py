"""Rows of a table, by number, on a GPU that reads them from wherever it can: its own memory, or pinned host memory.

A program takes a tile of one row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from halfbyte.kernels.launch import launch

MAX_BLOCK = 2048
ELEMENTS_PER_THREAD = 8


def gather_rows(ids_T: torch.Tensor, table_VD: torch.Tensor, out_TD: torch.Tensor) -> None:
    """Write the rows; arguments as those of the op, all contiguous."""
    width = table_VD.shape[1]
    block = min(1 << (width - 1).bit_length(), MAX_BLOCK)
    launch(
        _kernel(),
        ids_T.numel() * -(-width // block),
        ids_T,
        table_VD,
        out_TD,
        WIDTH=width,
        BLOCK=block,
        num_warps=max(1, block // (32 * ELEMENTS_PER_THREAD)),
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _gather_rows_kernel(ids_ptr, table_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        # Addresses: 64-bit scalars for the rows, 32-bit offsets inside them.
        TILES: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        token = (tl.program_id(0) // TILES).to(tl.int64)
        column = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(ids_ptr + token).to(tl.int64)
        values = tl.load(table_ptr + row * WIDTH + column, mask=column < WIDTH, other=0)
        tl.store(out_ptr + token * WIDTH + column, values.to(out_ptr.dtype.element_ty), mask=column < WIDTH)

    return _gather_rows_kernel
