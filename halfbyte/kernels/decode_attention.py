"""Attention of one new token on a GPU: heads normed and turned, keys and values cached, in one launch or two.

A program takes the query heads of one key head and a range of keys, [GROUP, KEYS, WIDTH] at a time. Each of its KEYS
lanes keeps a running maximum, sum and weighted values of its own, so that the loop exchanges nothing between threads
but a score's sum over a head's width; lanes are joined once, at the end. Products are on the ordinary units: a token
reads every key for a few heads only, and the time is that of reading.

Queries are normed and turned by every program that needs them: a few hundred bytes, against a launch of its own. The
new token's key is the last program's to make and to store; it begins that program's first lane and is not read back.

Split-K: where one program a key head leaves most of the GPU idle, SPLITS programs share the keys of a prompt evenly,
whatever their number is just then, and a second launch joins what they found. How many keys there are is read from the
device: the same launches serve every step.

With overlap, see matvec_4bit, the first keys and values are loaded while the kernels before still run: they are of
earlier tokens.

Source: Dao et al., Flash-Decoding for long-context inference, 2023.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from halfbyte.kernels.launch import launch as launch_kernel

# B prompts, N query heads, K key heads, H head width, A = N H, C capacity of the cache


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeAttentionLaunch:
    """How the kernels are launched. Results differ by the order of fp32 sums."""

    num_splits: int = 1
    keys_per_step: int = 32
    """A power of two."""
    num_warps: int = 4
    overlap: bool = False
    """Whether they may start while kernels before them still run."""


def decode_attention(
    products: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    length_B: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    out_BA: torch.Tensor,
    *,
    eps: float,
    scale: float,
    window: int | None,
    launch: DecodeAttentionLaunch,
) -> None:
    """Write what each head sees to `out_BA`, contiguous; arguments as those of the op."""
    prompts, key_heads, capacity, width = key_BKCH.shape
    query_heads, splits = out_BA.shape[1] // width, launch.num_splits
    group = query_heads // key_heads
    num_parts = prompts * query_heads * splits
    sizes = {"WIDTH": width, "BLOCK": _power_of_two(width), "SPLITS": splits, "OVERLAP": launch.overlap}
    # What programs that share a prompt's keys find, and its maxima and sums.
    shapes = ((0,), (0,)) if splits == 1 else ((num_parts, width), (2, num_parts))
    parts = [torch.empty(shape, dtype=torch.float32, device=out_BA.device) for shape in shapes]
    launch_kernel(
        _attend_kernel(),
        prompts * key_heads * splits,
        *products,
        *((out_BA, out_BA) if angles is None else angles),
        *((out_BA, out_BA) if norms is None else norms),
        length_B,
        key_BKCH,
        value_BKCH,
        out_BA,
        *parts,
        *(product.stride(0) for product in products),
        capacity,
        num_parts,
        eps,
        scale * math.log2(math.e),
        **_functions(),
        NORM=norms is not None,
        ROTATE=angles is not None,
        WINDOW=window or 0,
        KEY_HEADS=key_heads,
        GROUP=group,
        GROUP_BLOCK=_power_of_two(group),
        KEYS=launch.keys_per_step,
        num_warps=launch.num_warps,
        **sizes,
    )
    if splits > 1:
        _join(parts, out_BA, num_parts, sizes)


def _join(parts: list[torch.Tensor], out_BA: torch.Tensor, num_parts: int, sizes: dict[str, Any]) -> None:
    """Write to `out_BA` what the parts make together."""
    launch_kernel(
        _join_kernel(),
        num_parts // sizes["SPLITS"],
        *parts,
        out_BA,
        num_parts,
        SPLIT_BLOCK=_power_of_two(sizes["SPLITS"]),
        num_warps=4,
        **sizes,
    )


def _functions() -> dict[str, Any]:
    """Return what the kernel is made of."""
    load, step = _step_functions()
    return {
        "TURN": _turn_function(),
        "BEGIN": _begin_function(),
        "LOAD": load,
        "STEP": step,
        "STORE": _store_function(),
    }


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def _turn_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _turn(
        row_ptr, norm_ptr, cos_ptr, sin_ptr, in_head, column, eps,
        NORM: tl.constexpr, ROTATE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Return heads normed and turned, [rows, 1, BLOCK]."""
        in_width = column < WIDTH
        x = tl.load(row_ptr + column, mask=in_head, other=0).to(tl.float32)
        partner = tl.where(column < WIDTH // 2, column + WIDTH // 2, column - WIDTH // 2)
        if NORM:
            r = tl.rsqrt(tl.sum(x * x, axis=2) / WIDTH + eps)[:, :, None]
            x = x * r * tl.load(norm_ptr + column, mask=in_width, other=0).to(tl.float32)
        if ROTATE:
            opposite = tl.load(row_ptr + partner, mask=in_head, other=0).to(tl.float32)
            if NORM:
                opposite = opposite * r * tl.load(norm_ptr + partner, mask=in_width, other=0).to(tl.float32)
            cos = tl.load(cos_ptr + column, mask=in_width, other=0).to(tl.float32)
            sin = tl.load(sin_ptr + column, mask=in_width, other=0).to(tl.float32)
            x = x * cos + tl.where(column < WIDTH // 2, -opposite, opposite) * sin
        return x

    return _turn


@functools.cache
def _begin_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _begin(
        q, k_ptr, v_ptr, norm_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, is_mine, eps,
        TURN: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
        GROUP_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Store the new token's key and value, if this program is to, and begin the first lane with it."""
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = (column < WIDTH) & is_mine
        key = TURN(k_ptr, norm_ptr, cos_ptr, sin_ptr, mask, column, eps, NORM, ROTATE, WIDTH)
        key = key.to(key_ptr.dtype.element_ty)
        value = tl.load(v_ptr + column, mask=mask, other=0)
        tl.store(key_ptr + column, key, mask=mask)
        tl.store(value_ptr + column, value.to(value_ptr.dtype.element_ty), mask=mask)
        is_first = (tl.arange(0, KEYS)[None, :] == 0) & is_mine
        # Finite, or a lane without a key would subtract infinities.
        top = tl.where(is_first, tl.sum(q * key.to(tl.float32), axis=2), -1e30)
        total = tl.zeros([GROUP_BLOCK, KEYS], tl.float32) + tl.where(is_first, 1.0, 0.0)
        return top, total, total[:, :, None] * value.to(tl.float32)

    return _begin


@functools.cache
def _step_functions() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _load(at, stop, key_ptr, value_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
        """Return the next KEYS keys, one a lane, and their values."""
        lane = tl.arange(0, KEYS)[None, :, None]
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = (at + lane < stop) & (column < WIDTH)
        offset = (at + lane) * WIDTH + column
        return tl.load(key_ptr + offset, mask=mask, other=0), tl.load(value_ptr + offset, mask=mask, other=0)

    @triton.jit
    def _step(q, at, stop, top, total, values, key, value, KEYS: tl.constexpr):
        """Take them in: return the lanes' maxima, sums and weighted values."""
        seen = at + tl.arange(0, KEYS)[None, :] < stop
        score = tl.where(seen, tl.sum(q * key.to(tl.float32), axis=2), -1e30)
        new_top = tl.maximum(top, score)
        shrink = tl.exp2(top - new_top)
        weight = tl.where(seen, tl.exp2(score - new_top), 0.0)
        values = values * shrink[:, :, None] + weight[:, :, None] * value.to(tl.float32)
        return new_top, total * shrink + weight, values

    return _load, _step


@functools.cache
def _store_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _store(
        top, total, values, head, split, out_ptr, part_ptr, stats_ptr, num_parts,
        GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """Join the lanes, and store the result or this program's part of it."""
        highest = tl.max(top, axis=1)
        shrink = tl.exp2(top - highest[:, None])
        total_of_row = tl.sum(total * shrink, axis=1)
        joined = tl.sum(values * shrink[:, :, None], axis=1)
        row = tl.arange(0, GROUP_BLOCK)
        column = tl.arange(0, BLOCK)[None, :]
        mask = (row < GROUP)[:, None] & (column < WIDTH)
        place = head * GROUP + row
        if SPLITS == 1:
            out = joined / total_of_row[:, None]
            tl.store(out_ptr + place[:, None] * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            place = place * SPLITS + split
            tl.store(part_ptr + place[:, None] * WIDTH + column, joined, mask=mask)
            tl.store(stats_ptr + place, highest, mask=row < GROUP)
            tl.store(stats_ptr + num_parts + place, total_of_row, mask=row < GROUP)

    return _store


@functools.cache
def _attend_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_parts"])
    def _decode_attention_kernel(
        q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, length_ptr, key_ptr, value_ptr, out_ptr,
        part_ptr, stats_ptr, q_stride, k_stride, v_stride, capacity, num_parts, eps, scale,
        TURN: tl.constexpr, BEGIN: tl.constexpr, LOAD: tl.constexpr, STEP: tl.constexpr, STORE: tl.constexpr,
        NORM: tl.constexpr, ROTATE: tl.constexpr, WINDOW: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr,
        GROUP_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        split = tl.program_id(0) % SPLITS
        # The key head among those of all prompts.
        head = (tl.program_id(0) // SPLITS).to(tl.int64)
        prompt, own_head = head // KEY_HEADS, head % KEY_HEADS
        length = tl.load(length_ptr + prompt)
        first = length * 0
        if WINDOW > 0:
            first = tl.maximum(length + 1 - WINDOW, 0)
        share = ((length - first + SPLITS - 1) // SPLITS + KEYS - 1) // KEYS * KEYS
        at = first + split * share
        stop = tl.minimum(at + share, length)

        row = tl.arange(0, GROUP_BLOCK)[:, None, None]
        column = tl.arange(0, BLOCK)[None, None, :]
        cos_ptr += length * WIDTH
        sin_ptr += length * WIDTH
        key_ptr += head * capacity * WIDTH
        value_ptr += head * capacity * WIDTH
        in_head = (row < GROUP) & (column < WIDTH)
        loaded = LOAD(at, stop, key_ptr, value_ptr, WIDTH, BLOCK, KEYS)
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        q_row = q_ptr + prompt * q_stride + (own_head * GROUP + row) * WIDTH
        q = TURN(q_row, q_norm_ptr, cos_ptr, sin_ptr, in_head, column, eps, NORM, ROTATE, WIDTH) * scale
        own = prompt * k_stride + own_head * WIDTH, prompt * v_stride + own_head * WIDTH
        place = length * WIDTH
        top, total, values = BEGIN(
            q, k_ptr + own[0], v_ptr + own[1], k_norm_ptr, cos_ptr, sin_ptr, key_ptr + place, value_ptr + place,
            split == SPLITS - 1, eps, TURN, NORM, ROTATE, GROUP_BLOCK, WIDTH, BLOCK, KEYS,
        )  # fmt: skip
        while at < stop:
            following = LOAD(at + KEYS, stop, key_ptr, value_ptr, WIDTH, BLOCK, KEYS)
            top, total, values = STEP(q, at, stop, top, total, values, loaded[0], loaded[1], KEYS)
            loaded = following
            at += KEYS
        STORE(
            top, total, values, head, split, out_ptr, part_ptr, stats_ptr, num_parts,
            GROUP, GROUP_BLOCK, WIDTH, BLOCK, SPLITS,
        )  # fmt: skip

    return _decode_attention_kernel


@functools.cache
def _join_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_parts"])
    def _join_splits_kernel(
        part_ptr, stats_ptr, out_ptr, num_parts,
        WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
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
