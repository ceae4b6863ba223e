"""The inner product of an adapter on a GPU: a tall matrix times a few rows, in one pass over the tall one.

A program takes BLOCK_TOKENS rows of x and walks along their columns; the adapter's rows, some hundred KB, come from the
second-level cache. The time is that of reading x. Dropout is applied to x on the way, and the result goes to two
places at once, for one of them is the column beside x that a riding adapter needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import torch

from halfbyte.kernels.counter_dropout import HashDropout, dropout_arguments, keep_function
from halfbyte.kernels.launch import launch as launch_kernel

# T tokens, D features, R ranks
MAX_RANKS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterInnerLaunch:
    """How the kernel is launched. It changes the result only by the order of fp32 sums."""

    tokens_per_program: int = 32
    columns_per_step: int = 256
    num_warps: int = 4
    num_stages: int = 4


def adapter_inner(
    x_TD: torch.Tensor,
    A_RD: torch.Tensor,
    scale: float,
    out_TR: torch.Tensor,
    also_TR: torch.Tensor | None,
    *,
    dropout: HashDropout | None,
    launch: AdapterInnerLaunch,
) -> None:
    """Write the product to `out_TR` and `also_TR`; arguments as those of the op, A contiguous."""
    num_tokens, width = x_TD.shape
    ranks = A_RD.shape[0]
    also = out_TR if also_TR is None else also_TR
    launch_kernel(
        _kernel(),
        -(-num_tokens // launch.tokens_per_program),
        x_TD,
        A_RD,
        out_TR,
        also,
        x_TD.stride(0),
        also.stride(0),
        num_tokens,
        scale,
        *dropout_arguments(dropout, x_TD),
        KEEP=keep_function(),
        DROPOUT=dropout is not None,
        ALSO=also_TR is not None,
        # The interpreter knows no 16-bit products.
        WIDENED=os.environ.get("TRITON_INTERPRET") == "1",
        WIDTH=width,
        RANKS=ranks,
        BLOCK_RANKS=max(16, 1 << (ranks - 1).bit_length()),
        BLOCK_TOKENS=launch.tokens_per_program,
        BLOCK_COLUMNS=launch.columns_per_step,
        ALIGNMENT=math.gcd(x_TD.stride(0), 16),
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["x_stride", "also_stride", "num_tokens", "has_base", "seed", "threshold"])
    def _adapter_inner_kernel(
        x_ptr, a_ptr, out_ptr, also_ptr, x_stride, also_stride, num_tokens, scale, base_ptr, has_base, seed, threshold,
        KEEP: tl.constexpr, DROPOUT: tl.constexpr, ALSO: tl.constexpr, WIDENED: tl.constexpr,
        WIDTH: tl.constexpr, RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        # Addresses: 64 bits for the rows, 32-bit offsets inside them.
        token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        token_mask = (token < num_tokens)[:, None]
        rank = tl.arange(0, BLOCK_RANKS)
        x_row = x_ptr + tl.multiple_of(token * x_stride, ALIGNMENT)[:, None]
        place = (token * WIDTH).to(tl.uint32)[:, None]
        sums = tl.zeros([BLOCK_TOKENS, BLOCK_RANKS], tl.float32)
        for start in tl.range(0, WIDTH, BLOCK_COLUMNS, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            in_row = (column < WIDTH)[None, :]
            x = tl.load(x_row + column[None, :], mask=token_mask & in_row, other=0)
            a = tl.load(a_ptr + rank[:, None] * WIDTH + column[None, :], mask=(rank < RANKS)[:, None] & in_row, other=0)
            if WIDENED:
                x = x.to(tl.float32)
                a = a.to(tl.float32)
            if DROPOUT:
                keep = KEEP(place + column.to(tl.uint32)[None, :], base_ptr, has_base, seed, threshold)
                x = tl.where(keep, x, tl.zeros_like(x))
            sums = tl.dot(x, tl.trans(a), sums)
        u = (sums * scale).to(out_ptr.dtype.element_ty)
        mask = token_mask & (rank < RANKS)[None, :]
        tl.store(out_ptr + token[:, None] * RANKS + rank[None, :], u, mask=mask)
        if ALSO:
            tl.store(also_ptr + token[:, None] * also_stride + rank[None, :], u, mask=mask)

    return _adapter_inner_kernel
