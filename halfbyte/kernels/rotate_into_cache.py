"""Queries, keys and values of one new token on a GPU, normed, turned and put where attention reads them in one launch.

A program takes one head of one prompt; both halves of it lie in the same threads. Where in the cache the token goes,
and by which angles it turns, is read from the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from halfbyte.kernels.launch import launch

# B prompts, N query heads, K key heads, H head width, C capacity of the cache


def rotate_into_cache(
    products: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    length_B: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    out_BNH: torch.Tensor,
    *,
    eps: float,
    rotates: bool,
) -> None:
    """Write queries to `out_BNH`, keys and values into the cache; arguments as those of the op."""
    prompts, query_heads, width = out_BNH.shape
    key_heads, capacity = key_BKCH.shape[1:3]
    half = width // 2
    block = 1 << (half - 1).bit_length()
    launch(
        _kernel(),
        prompts * (query_heads + 2 * key_heads),
        *products,
        *angles,
        *(angles if norms is None else norms),
        length_B,
        key_BKCH,
        value_BKCH,
        out_BNH,
        *(product.stride(0) for product in products),
        capacity,
        eps,
        MOVE=_move_function(),
        NORM=norms is not None,
        ROTATE=rotates,
        QUERY_HEADS=query_heads,
        KEY_HEADS=key_heads,
        HALF=half,
        BLOCK=block,
        num_warps=max(1, block // 64),
    )


@functools.cache
def _move_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _move(
        source_ptr, target_ptr, norm_ptr, cos_ptr, sin_ptr, eps,
        NORM: tl.constexpr, ROTATE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Bring one head from source to target."""
        column = tl.arange(0, BLOCK)
        mask = column < HALF
        low = tl.load(source_ptr + column, mask=mask, other=0).to(tl.float32)
        high = tl.load(source_ptr + HALF + column, mask=mask, other=0).to(tl.float32)
        if NORM:
            r = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / (2 * HALF) + eps)
            low = low * r * tl.load(norm_ptr + column, mask=mask, other=0).to(tl.float32)
            high = high * r * tl.load(norm_ptr + HALF + column, mask=mask, other=0).to(tl.float32)
        if ROTATE:
            cos = tl.load(cos_ptr + column, mask=mask, other=0).to(tl.float32)
            sin = tl.load(sin_ptr + column, mask=mask, other=0).to(tl.float32)
            turned = low * cos - high * sin
            high = high * cos + low * sin
            low = turned
        tl.store(target_ptr + column, low.to(target_ptr.dtype.element_ty), mask=mask)
        tl.store(target_ptr + HALF + column, high.to(target_ptr.dtype.element_ty), mask=mask)

    return _move


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _rotate_into_cache_kernel(
        q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, length_ptr, key_ptr, value_ptr, out_ptr,
        q_stride, k_stride, v_stride, capacity, eps,
        MOVE: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
        QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        WIDTH: tl.constexpr = 2 * HALF
        HEADS: tl.constexpr = QUERY_HEADS + 2 * KEY_HEADS
        prompt = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        length = tl.load(length_ptr + prompt)
        cos_ptr += length * WIDTH
        sin_ptr += length * WIDTH
        if head < QUERY_HEADS:
            target_ptr = out_ptr + (prompt * QUERY_HEADS + head) * WIDTH
            source_ptr = q_ptr + prompt * q_stride + head * WIDTH
            MOVE(source_ptr, target_ptr, q_norm_ptr, cos_ptr, sin_ptr, eps, NORM, ROTATE, HALF, BLOCK)
        elif head < QUERY_HEADS + KEY_HEADS:
            key_head = head - QUERY_HEADS
            target_ptr = key_ptr + ((prompt * KEY_HEADS + key_head) * capacity + length) * WIDTH
            source_ptr = k_ptr + prompt * k_stride + key_head * WIDTH
            MOVE(source_ptr, target_ptr, k_norm_ptr, cos_ptr, sin_ptr, eps, NORM, ROTATE, HALF, BLOCK)
        else:
            value_head = head - QUERY_HEADS - KEY_HEADS
            target_ptr = value_ptr + ((prompt * KEY_HEADS + value_head) * capacity + length) * WIDTH
            source_ptr = v_ptr + prompt * v_stride + value_head * WIDTH
            MOVE(source_ptr, target_ptr, k_norm_ptr, cos_ptr, sin_ptr, eps, False, False, HALF, BLOCK)

    return _rotate_into_cache_kernel
