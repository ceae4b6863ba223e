"""Dropout by a hash of an element's place on a GPU: the hash for other kernels, and a kernel of its own.

    h = (i * 0x9E3779B1 + seed) mod 2^32
    h ^= h >> 16;  h *= 0x21F0AAAD;  h ^= h >> 15;  h *= 0x735A2D97;  h ^= h >> 15;  kept = h >= threshold

Three products and a few shifts of 32 bits an element, which hide behind the loads and stores of a kernel that passes
over the elements anyway. A place is that in the flattened logical tensor, wherever its rows lie. Seed and threshold
are not specialised, so that a new seed does not compile a new kernel; what changes the seed from step to step is read
from the device, so that a graph of kernels can be launched again with other masks.

A program takes a tile of one row's columns. Tiles are no power of two wide as a whole, so that rows of 11008 leave few
threads idle; every thread moves eight neighbours, 16 bytes of a 16-bit dtype.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

import torch

from halfbyte.kernels.launch import launch

ELEMENTS_PER_THREAD = 8
THREADS_PER_WARP = 32


class HashDropout(Protocol):
    """Which elements are dropped: those whose hash is below the threshold."""

    @property
    def seed(self) -> int:
        """In [0, 2^31)."""

    @property
    def base(self) -> torch.Tensor | None:
        """int32, one element on the device; its bits flip those of the seed."""

    @property
    def threshold(self) -> int:
        """In [0, 2^32)."""


def drop_copy(x: torch.Tensor, out: torch.Tensor, dropout: HashDropout) -> None:
    """Write `x` with the dropped elements set to zero to `out`, (tokens, features) both; rows of any stride."""
    block = columns_per_program(out.shape[1])
    launch(
        _kernel(),
        out.shape[0] * -(-out.shape[1] // block),
        x,
        out,
        x.stride(0),
        out.stride(0),
        *dropout_arguments(dropout, x),
        KEEP=keep_function(),
        WIDTH=out.shape[1],
        BLOCK=block,
        ALIGNMENT=math.gcd(x.stride(0), out.stride(0), 16),
        num_warps=block // (ELEMENTS_PER_THREAD * THREADS_PER_WARP),
    )


def columns_per_program(width: int) -> int:
    """Return how wide a tile of one row is: large, but little of the last one outside the row."""
    sizes = (2048, 1024, 512)
    idle = {size: -width % size / width for size in sizes}
    return next((size for size in sizes if idle[size] < 0.05), min(sizes, key=lambda size: idle[size]))


def dropout_arguments(dropout: HashDropout | None, any_tensor: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Return what a kernel gets: base, whether there is one, seed, and threshold.

    Where there is no base, `any_tensor` stands in its place. The threshold is a signed number, for an argument's type
    goes by its size.
    """
    if dropout is None:
        return any_tensor, 0, 0, 0
    base = any_tensor if dropout.base is None else dropout.base
    return base, int(dropout.base is not None), dropout.seed, dropout.threshold - (dropout.threshold >> 31 << 32)


@functools.cache
def keep_function() -> Any:
    """Return the hash, a function for kernels, which take it as an argument."""
    # Called from a kernel of another file, the interpreter looks for the language among this file's globals.
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def _keep(place, base_ptr, has_base, seed, threshold):
        """Return where the elements at `place`, uint32, are kept."""
        if has_base:
            seed ^= tl.load(base_ptr).to(tl.int32)
        h = place * 0x9E3779B1 + seed.to(tl.uint32)
        h = (h ^ (h >> 16)) * 0x21F0AAAD
        h = (h ^ (h >> 15)) * 0x735A2D97
        return (h ^ (h >> 15)) >= threshold.to(tl.uint32)

    return _keep


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["x_stride", "out_stride", "has_base", "seed", "threshold"])
    def _counter_dropout_kernel(
        x_ptr, out_ptr, x_stride, out_stride, base_ptr, has_base, seed, threshold,
        KEEP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        # Addresses: a 64-bit scalar for the row, 32-bit offsets inside it.
        TILES: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        row = (tl.program_id(0) // TILES).to(tl.int64)
        column = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
        mask = column < WIDTH
        x_row = x_ptr + tl.multiple_of(row * x_stride, ALIGNMENT)
        out_row = out_ptr + tl.multiple_of(row * out_stride, ALIGNMENT)
        keep = KEEP((row * WIDTH).to(tl.uint32) + column.to(tl.uint32), base_ptr, has_base, seed, threshold)
        y = tl.where(keep, tl.load(x_row + column, mask=mask, other=0).to(tl.float32), 0.0)
        tl.store(out_row + column, y.to(out_ptr.dtype.element_ty), mask=mask)

    return _counter_dropout_kernel
