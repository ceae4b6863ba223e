"""Rotary position embedding on a GPU, in place.

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

# T tokens, N heads, H head width


def rotate(x_TNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor, *, backward: bool) -> None:
    """Turn every head of `x_TNH`, or turn it back; arguments as those of the op."""
    num_tokens, num_heads, width = x_TNH.shape
    half_block = 1 << (width // 2 - 1).bit_length()
    tokens = max(1, PLACES_PER_PROGRAM // half_block)
    heads = min(num_heads, HEADS_PER_PROGRAM)
    launch(
        _kernel(),
        -(-num_tokens // tokens) * -(-num_heads // heads),
        x_TNH,
        cos_TH,
        sin_TH,
        x_TNH.stride(0),
        x_TNH.stride(1),
        num_tokens,
        BACKWARD=backward,
        NUM_HEADS=num_heads,
        HALF=width // 2,
        TOKENS=tokens,
        HEADS=heads,
        BLOCK=half_block,
        ALIGNMENT=math.gcd(x_TNH.stride(0), x_TNH.stride(1), width // 2, 16),
        num_warps=4,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["token_stride", "head_stride", "num_tokens"])
    def _rotate_kernel(
        x_ptr, cos_ptr, sin_ptr, token_stride, head_stride, num_tokens,
        BACKWARD: tl.constexpr, NUM_HEADS: tl.constexpr, HALF: tl.constexpr,
        TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
        token = (tl.program_id(0) // GROUPS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        first = tl.program_id(0) % GROUPS * HEADS
        column = tl.arange(0, BLOCK)[None, :]
        mask = (token < num_tokens)[:, None] & (column < HALF)
        angle = tl.multiple_of(token * (2 * HALF), ALIGNMENT)[:, None]
        cos = tl.load(cos_ptr + angle + column, mask=mask, other=0).to(tl.float32)
        sin = tl.load(sin_ptr + angle + column, mask=mask, other=0).to(tl.float32)
        if BACKWARD:
            sin = -sin

        token_ptr = x_ptr + tl.multiple_of(token * token_stride, ALIGNMENT)[:, None]
        # Of no length yet, but of a type.
        lows = ((cos,) * HEADS)[:0]
        highs = lows
        for head in tl.static_range(HEADS):
            head_ptr = token_ptr + tl.multiple_of((first + head).to(tl.int64) * head_stride, ALIGNMENT)
            head_mask = mask & (first + head < NUM_HEADS)
            lows += (tl.load(head_ptr + column, mask=head_mask, other=0),)
            highs += (tl.load(head_ptr + HALF + column, mask=head_mask, other=0),)
        for head in tl.static_range(HEADS):
            head_ptr = token_ptr + tl.multiple_of((first + head).to(tl.int64) * head_stride, ALIGNMENT)
            head_mask = mask & (first + head < NUM_HEADS)
            low = lows[head].to(tl.float32)
            high = highs[head].to(tl.float32)
            tl.store(head_ptr + column, (low * cos - high * sin).to(x_ptr.dtype.element_ty), mask=head_mask)
            tl.store(head_ptr + HALF + column, (high * cos + low * sin).to(x_ptr.dtype.element_ty), mask=head_mask)

    return _rotate_kernel
