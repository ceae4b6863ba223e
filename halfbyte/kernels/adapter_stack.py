"""Cast the adapters of one input on a GPU, all of them in one launch, to where products read them.

A's are stacked; B's go to the columns beside the weights that ride with them, each to the rows of its projection and
the columns of its ranks, with zeros elsewhere. Some programs write tiles of those columns, the others stretches of A.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from halfbyte.kernels.launch import launch

MAX_MEMBERS = 3
ROWS_PER_PROGRAM = 64
ELEMENTS_PER_PROGRAM = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class StackMember:
    """One adapter and its place."""

    A_rD: torch.Tensor
    B_fr: torch.Tensor
    first_row: int
    first_rank: int
    scaling: float
    """Factor of B."""


def stack_adapters(members: Sequence[StackMember], A_RD: torch.Tensor | None, columns_FR: torch.Tensor) -> None:
    """Write the members' A to the first rows of `A_RD`, unless it is None, and their B to all of `columns_FR`.

    Args:
        members: One to three; A and B contiguous, ranks one after another from 0.
        A_RD: (ranks or more, features), contiguous.
        columns_FR: (out_features, ranks or more), rows of any stride.
    """
    num_A = 0 if A_RD is None else sum(member.A_rD.numel() for member in members)
    row_programs = -(-columns_FR.shape[0] // ROWS_PER_PROGRAM)
    slots = [*members, *[members[0]] * (MAX_MEMBERS - len(members))]
    numbers = [n for m in slots for n in (m.first_row, m.B_fr.shape[0], m.first_rank, m.B_fr.shape[1])]
    launch(
        _kernel(),
        row_programs + -(-num_A // ELEMENTS_PER_PROGRAM),
        columns_FR,
        columns_FR if A_RD is None else A_RD,
        *[m.A_rD for m in slots],
        *[m.B_fr for m in slots],
        *[m.scaling for m in slots],
        *numbers,
        columns_FR.shape[0],
        columns_FR.stride(0),
        columns_FR.shape[1],
        row_programs,
        members[0].A_rD.shape[1],
        MEMBERS=len(members),
        BLOCK_RANKS=1 << (columns_FR.shape[1] - 1).bit_length(),
        ROWS=ROWS_PER_PROGRAM,
        ELEMENTS=ELEMENTS_PER_PROGRAM,
        num_warps=4,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    numbers = [f"{name}{slot}" for slot in range(MAX_MEMBERS) for name in ("row", "rows", "rank", "ranks")]

    @triton.jit(do_not_specialize=[*numbers, "num_rows", "stride", "num_columns", "row_programs", "width"])
    def _stack_adapters_kernel(
        columns_ptr, stack_ptr, A0, A1, A2, B0, B1, B2, scaling0, scaling1, scaling2,
        row0, rows0, rank0, ranks0, row1, rows1, rank1, ranks1, row2, rows2, rank2, ranks2,
        num_rows, stride, num_columns, row_programs, width,
        MEMBERS: tl.constexpr, BLOCK_RANKS: tl.constexpr, ROWS: tl.constexpr, ELEMENTS: tl.constexpr,
    ):  # fmt: skip
        A_ptrs = (A0, A1, A2)
        B_ptrs = (B0, B1, B2)
        scalings = (scaling0, scaling1, scaling2)
        first_rows = (row0, row1, row2)
        sizes = (rows0, rows1, rows2)
        first_ranks = (rank0, rank1, rank2)
        ranks = (ranks0, ranks1, ranks2)
        program = tl.program_id(0)
        if program < row_programs:
            row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            column = tl.arange(0, BLOCK_RANKS)[None, :]
            tile = tl.zeros([ROWS, BLOCK_RANKS], tl.float32)
            for member in tl.static_range(MEMBERS):
                r = row - first_rows[member]
                c = column - first_ranks[member]
                mask = (r >= 0) & (r < sizes[member]) & (c >= 0) & (c < ranks[member])
                value = tl.load(B_ptrs[member] + r * ranks[member] + c, mask=mask, other=0).to(tl.float32)
                tile += value * scalings[member]
            mask = (row < num_rows) & (column < num_columns)
            tl.store(columns_ptr + row * stride + column, tile.to(columns_ptr.dtype.element_ty), mask=mask)
        else:
            place = (program - row_programs) * ELEMENTS + tl.arange(0, ELEMENTS)
            stretch = tl.zeros([ELEMENTS], tl.float32)
            written = place < 0
            for member in tl.static_range(MEMBERS):
                local = place - first_ranks[member] * width
                inside = (local >= 0) & (local < ranks[member] * width)
                stretch += tl.load(A_ptrs[member] + local, mask=inside, other=0).to(tl.float32)
                written |= inside
            tl.store(stack_ptr + place, stretch.to(stack_ptr.dtype.element_ty), mask=written)

    return _stack_adapters_kernel
