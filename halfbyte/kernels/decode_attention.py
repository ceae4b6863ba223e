"""Attention of one new token over a cache of fixed places on a GPU, in one launch or two.

A program takes the query heads of one key head and a range of keys, [GROUP, KEYS, WIDTH] at a time. Each of its KEYS
lanes keeps a running maximum, sum and weighted values of its own, so that the loop exchanges nothing between threads
but a score's sum over a head's width; lanes are joined once, at the end. Products are on the ordinary units: a token
reads every key for a few heads only, and the time is that of reading.

Split-K: where one program a key head leaves most of the GPU idle, SPLITS programs share the keys of a prompt evenly,
whatever their number is just then, and a second launch joins what they found. How many keys there are is read from the
device: the same launches serve every step.

Source: Dao et al., Flash-Decoding for long-context inference, 2023.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from halfbyte.kernels.launch import launch as launch_kernel

# B prompts, N query heads, K key heads, H head width, C capacity of the cache


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeAttentionLaunch:
    """How the kernels are launched. Results differ by the order of fp32 sums."""

    num_splits: int = 1
    keys_per_step: int = 32
    """A power of two."""
    num_warps: int = 4


def decode_attention(
    q_BNH: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    length_B: torch.Tensor,
    out_BNH: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    launch: DecodeAttentionLaunch,
) -> None:
    """Write what each head sees to `out_BNH`; arguments as those of the op, contiguous."""
    prompts, query_heads, width = q_BNH.shape
    key_heads, capacity = key_BKCH.shape[1:3]
    splits, group = launch.num_splits, query_heads // key_heads
    block = _power_of_two(width)
    part_shape = (prompts * query_heads, splits, width)
    part = out_BNH if splits == 1 else q_BNH.new_empty(part_shape, dtype=torch.float32)
    stats = out_BNH if splits == 1 else q_BNH.new_empty(2, *part_shape[:2], dtype=torch.float32)
    launch_kernel(
        _attend_kernel(),
        prompts * key_heads * splits,
        q_BNH,
        key_BKCH,
        value_BKCH,
        length_B,
        out_BNH,
        part,
        stats,
        capacity,
        prompts * query_heads * splits,
        scale * math.log2(math.e),
        STEP=_step_function(),
        WINDOW=window or 0,
        KEY_HEADS=key_heads,
        GROUP=group,
        GROUP_BLOCK=_power_of_two(group),
        WIDTH=width,
        BLOCK=block,
        KEYS=launch.keys_per_step,
        SPLITS=splits,
        num_warps=launch.num_warps,
    )
    if splits > 1:
        launch_kernel(
            _join_kernel(),
            prompts * query_heads,
            part,
            stats,
            out_BNH,
            prompts * query_heads * splits,
            WIDTH=width,
            BLOCK=block,
            SPLITS=splits,
            SPLIT_BLOCK=_power_of_two(splits),
            num_warps=4,
        )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def _step_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _step(
        q, at, stop, top, total, values, key_ptr, value_ptr,
        WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Take in the next KEYS keys, one a lane: return the lanes' maxima, sums and weighted values."""
        lane = tl.arange(0, KEYS)[None, :, None]
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = (at + lane < stop) & (column < WIDTH)
        offset = (at + lane) * WIDTH + column
        key = tl.load(key_ptr + offset, mask=mask, other=0).to(tl.float32)
        value = tl.load(value_ptr + offset, mask=mask, other=0).to(tl.float32)
        seen = at + tl.arange(0, KEYS)[None, :] < stop
        score = tl.where(seen, tl.sum(q * key, axis=2), -1e30)
        new_top = tl.maximum(top, score)
        shrink = tl.exp2(top - new_top)
        weight = tl.where(seen, tl.exp2(score - new_top), 0.0)
        return new_top, total * shrink + weight, values * shrink[:, :, None] + weight[:, :, None] * value

    return _step


@functools.cache
def _attend_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_parts"])
    def _decode_attention_kernel(
        q_ptr, key_ptr, value_ptr, length_ptr, out_ptr, part_ptr, stats_ptr, capacity, num_parts, scale,
        STEP: tl.constexpr, WINDOW: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr,
        GROUP_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        split = tl.program_id(0) % SPLITS
        # The key head among those of all prompts.
        head = (tl.program_id(0) // SPLITS).to(tl.int64)
        # The new token's own key is in the cache already.
        end = tl.load(length_ptr + head // KEY_HEADS) + 1
        first = end * 0
        if WINDOW > 0:
            first = tl.maximum(end - WINDOW, 0)
        share = ((end - first + SPLITS - 1) // SPLITS + KEYS - 1) // KEYS * KEYS
        at = first + split * share
        stop = tl.minimum(at + share, end)

        row = tl.arange(0, GROUP_BLOCK)[:, None, None]
        column = tl.arange(0, BLOCK)[None, None, :]
        in_head = (row < GROUP) & (column < WIDTH)
        q = tl.load(q_ptr + (head * GROUP + row) * WIDTH + column, mask=in_head, other=0).to(tl.float32) * scale
        key_ptr += head * capacity * WIDTH
        value_ptr += head * capacity * WIDTH
        # Finite, or a lane without a key would subtract infinities.
        top = tl.full([GROUP_BLOCK, KEYS], -1e30, tl.float32)
        total = tl.zeros([GROUP_BLOCK, KEYS], tl.float32)
        values = tl.zeros([GROUP_BLOCK, KEYS, BLOCK], tl.float32)
        while at < stop:
            top, total, values = STEP(q, at, stop, top, total, values, key_ptr, value_ptr, WIDTH, BLOCK, KEYS)
            at += KEYS

        highest = tl.max(top, axis=1)
        shrink = tl.exp2(top - highest[:, None])
        total_of_row = tl.sum(total * shrink, axis=1)
        joined = tl.sum(values * shrink[:, :, None], axis=1)
        flat_row = tl.arange(0, GROUP_BLOCK)
        flat_column = tl.arange(0, BLOCK)[None, :]
        mask = (flat_row < GROUP)[:, None] & (flat_column < WIDTH)
        place = head * GROUP + flat_row
        if SPLITS == 1:
            out = joined / total_of_row[:, None]
            tl.store(out_ptr + place[:, None] * WIDTH + flat_column, out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            place = place * SPLITS + split
            tl.store(part_ptr + place[:, None] * WIDTH + flat_column, joined, mask=mask)
            tl.store(stats_ptr + place, highest, mask=flat_row < GROUP)
            tl.store(stats_ptr + num_parts + place, total_of_row, mask=flat_row < GROUP)

    return _decode_attention_kernel


@functools.cache
def _join_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_parts"])
    def _join_splits_kernel(
        part_ptr, stats_ptr, out_ptr, num_parts,
        WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(0)
        split = tl.arange(0, SPLIT_BLOCK)
        column = tl.arange(0, BLOCK)[None, :]
        place = head * SPLITS + split
        top = tl.load(stats_ptr + place, mask=split < SPLITS, other=-1e30)
        total = tl.load(stats_ptr + num_parts + place, mask=split < SPLITS, other=0)
        mask = (split < SPLITS)[:, None] & (column < WIDTH)
        part = tl.load(part_ptr + place[:, None] * WIDTH + column, mask=mask, other=0)
        shrink = tl.exp2(top - tl.max(top, axis=0))
        out = tl.sum(part * shrink[:, None], axis=0) / tl.sum(total * shrink, axis=0)
        flat_column = tl.arange(0, BLOCK)
        out_place = out_ptr + head * WIDTH + flat_column
        tl.store(out_place, out.to(out_ptr.dtype.element_ty), mask=flat_column < WIDTH)

    return _join_splits_kernel
