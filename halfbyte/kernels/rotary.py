"""Rotary position embedding on a GPU, in place or from one layout into another.

A program turns up to HEADS heads of a tile of tokens. Its threads stand on [TOKENS, half of a head], each keeps its
cosines and sines in registers and passes over the heads, so that they are read once a token and group of heads and
never change threads. All heads are loaded before the first is stored: a load could not pass a store that may be to its
address, and would wait.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from halfbyte.kernels.launch import launch

HEADS_PER_PROGRAM = 8
# By 128 threads, eight neighbours each.
PLACES_PER_PROGRAM = 1024

# B rows, L tokens a row, T = B L tokens, N heads, H head width


def rotate(
    x_BLNH: torch.Tensor,
    cos_TH: torch.Tensor | None,
    sin_TH: torch.Tensor | None,
    out_TNH: torch.Tensor,
    *,
    backward: bool,
) -> None:
    """Turn every head of `x_BLNH`, or turn it back, or move it as it is; arguments as those of the op."""
    num_tokens, num_heads, width = out_TNH.shape
    strides = *x_BLNH.stride()[:3], *out_TNH.stride()[:2]
    half_block = 1 << (width // 2 - 1).bit_length()
    tokens = max(1, PLACES_PER_PROGRAM // half_block)
    heads = min(num_heads, HEADS_PER_PROGRAM)
    launch(
        _kernel(),
        -(-num_tokens // tokens) * -(-num_heads // heads),
        x_BLNH,
        out_TNH if cos_TH is None else cos_TH,
        out_TNH if sin_TH is None else sin_TH,
        out_TNH,
        *strides,
        num_tokens,
        x_BLNH.shape[1],
        TURNS=cos_TH is not None,
        BACKWARD=backward,
        NUM_HEADS=num_heads,
        HALF=width // 2,
        TOKENS=tokens,
        HEADS=heads,
        BLOCK=half_block,
        ALIGNMENT=math.gcd(*strides, width // 2, 16),
        num_warps=4,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    strides = ["x_row", "x_token", "x_head", "out_token", "out_head"]

    @triton.jit(do_not_specialize=[*strides, "num_tokens", "row_tokens"])
    def _rotate_kernel(
        x_ptr, cos_ptr, sin_ptr, out_ptr, x_row, x_token, x_head, out_token, out_head, num_tokens, row_tokens,
        TURNS: tl.constexpr, BACKWARD: tl.constexpr, NUM_HEADS: tl.constexpr, HALF: tl.constexpr,
        TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
        token = (tl.program_id(0) // GROUPS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        first = tl.program_id(0) % GROUPS * HEADS
        column = tl.arange(0, BLOCK)[None, :]
        mask = (token < num_tokens)[:, None] & (column < HALF)
        angle = tl.multiple_of(token * (2 * HALF), ALIGNMENT)[:, None]
        if TURNS:
            cos = tl.load(cos_ptr + angle + column, mask=mask, other=0).to(tl.float32)
            sin = tl.load(sin_ptr + angle + column, mask=mask, other=0).to(tl.float32)
            if BACKWARD:
                sin = -sin

        x_offset = token // row_tokens * x_row + token % row_tokens * x_token
        x_ptr += tl.multiple_of(x_offset, ALIGNMENT)[:, None]
        out_ptr += tl.multiple_of(token * out_token, ALIGNMENT)[:, None]
        # Of no length yet, but of a type.
        lows = ((column,) * HEADS)[:0]
        highs = lows
        for head in tl.static_range(HEADS):
            head_ptr = x_ptr + tl.multiple_of((first + head).to(tl.int64) * x_head, ALIGNMENT)
            head_mask = mask & (first + head < NUM_HEADS)
            lows += (tl.load(head_ptr + column, mask=head_mask, other=0),)
            highs += (tl.load(head_ptr + HALF + column, mask=head_mask, other=0),)
        for head in tl.static_range(HEADS):
            head_ptr = out_ptr + tl.multiple_of((first + head).to(tl.int64) * out_head, ALIGNMENT)
            head_mask = mask & (first + head < NUM_HEADS)
            low = lows[head].to(tl.float32)
            high = highs[head].to(tl.float32)
            turned_low = low * cos - high * sin if TURNS else low
            turned_high = high * cos + low * sin if TURNS else high
            tl.store(head_ptr + column, turned_low.to(out_ptr.dtype.element_ty), mask=head_mask)
            tl.store(head_ptr + HALF + column, turned_high.to(out_ptr.dtype.element_ty), mask=head_mask)

    return _rotate_kernel
