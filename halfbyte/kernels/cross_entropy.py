"""Cross-entropy of a chunk of logits and its gradient on a GPU, one launch for both.

    z = cap * tanh(scale * (product + b) / cap)    loss = log(sum exp(z - m)) + m - z[label]    m = max z

    grad_product = (exp(z - m) / sum exp(z - m) - onehot(label)) * scale * (1 - tanh^2)

A program takes a row and passes over it twice. The first pass finds m and the sum together: whenever a larger m turns
up, the sum so far is multiplied by exp(old m - new m). Each group of elements that one thread reads at once, 16 bytes,
has an m and a sum of its own, so threads wait for one another only at the end of the row. The second pass writes the
gradient over the product. It goes backwards, because what the first read last is still in the cache: of 128,256 words
in 16 bits a row is 250 KiB, and the rows under way are together more than an H100's 50 MiB.

Arithmetic is fp32, with one rounding at the store. No program adds to what another one does: the same input gives the
same bytes.

Traffic for 16 bits: 2 bytes a logit for the loss; with the gradient 4, and 2 more where the second pass misses the
cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from halfbyte.kernels.launch import launch as launch_kernel

THREADS_PER_WARP = 32
ACCESS_BYTES = 16

# C tokens of a chunk, V vocabulary


@dataclasses.dataclass(frozen=True, slots=True)
class CrossEntropyLaunch:
    """How the kernel is launched. Results differ by the order of fp32 sums."""

    num_warps: int = 16
    """At most; a row too short for them gets fewer."""
    accesses_per_thread: int = 2
    """Of 16 bytes, at a time. A power of two."""


def cross_entropy(
    product_CV: torch.Tensor,
    labels_C: torch.Tensor,
    losses_C: torch.Tensor,
    *,
    bias_V: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignored_label: int,
    differentiate: bool,
    launch: CrossEntropyLaunch = CrossEntropyLaunch(),
) -> None:
    """Write the losses and, to differentiate, overwrite the product with its gradient.

    Args:
        product_CV: fp32, fp16 or bf16, rows of any stride.
        labels_C: Whole numbers, contiguous. Outside the vocabulary the loss is infinite.
        losses_C: fp32, contiguous.
        bias_V: fp32, contiguous, or None.
        scale: Factor of the logits.
        softcap: What logits are squeezed into, or None.
        ignored_label: Of rows whose loss and gradient are 0, whatever is in them.
        differentiate: Whether to write the gradient.
        launch: How to launch.
    """
    stride, vector = product_CV.stride(0), ACCESS_BYTES // product_CV.itemsize
    num_warps, groups = _tile(product_CV.shape[1], vector, launch)
    launch_kernel(
        _kernel(),
        product_CV.shape[0],
        product_CV,
        labels_C,
        losses_C,
        product_CV if bias_V is None else bias_V,
        stride,
        float(scale),
        float(scale if softcap is None else scale / softcap),
        float(1 if softcap is None else softcap),
        num_warps=num_warps,
        LOGITS=_logits_function(),
        BIAS=bias_V is not None,
        SOFTCAP=softcap is not None,
        DIFFERENTIATE=differentiate,
        IGNORED=ignored_label,
        WIDTH=product_CV.shape[1],
        GROUPS=groups,
        VECTOR=vector,
        ALIGNMENT=math.gcd(stride, 16),
    )


def _tile(width: int, vector: int, launch: CrossEntropyLaunch) -> tuple[int, int]:
    """Return the warps of a program, and how many groups of elements they take at a time."""
    groups_per_warp = THREADS_PER_WARP * launch.accesses_per_thread
    wanted = -(-width // (groups_per_warp * vector))
    num_warps = min(launch.num_warps, 1 << (wanted - 1).bit_length())
    return num_warps, num_warps * groups_per_warp


@functools.cache
def _logits_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _logits(product_ptr, bias_ptr, column, mask, factor, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
        """Return logits, -inf where masked, and the softcap's slope at them."""
        z = tl.load(product_ptr + column, mask=mask, other=0).to(tl.float32)
        if BIAS:
            z += tl.load(bias_ptr + column, mask=mask, other=0)
        z *= factor
        slope = 1.0
        if SOFTCAP:
            # Near 0, where 1 - e cancels, an odd polynomial fitted to tanh: within two units in the last place.
            square = z * z
            near = -0.0526717380 + square * 0.0164374355
            near = -0.3333294690 + square * (0.1332072467 + square * near)
            near = z + z * square * near
            e = tl.exp(-2.0 * tl.abs(z))
            far = (1.0 - e) / (1.0 + e)
            far = tl.where(z < 0.0, -far, far)
            # 1 - tanh^2, which would cancel far from 0.
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
            z = softcap * tl.where(tl.abs(z) < 0.55, near, far)
        return tl.where(mask, z, float("-inf")), slope

    return _logits


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["row_stride"])
    def _cross_entropy_kernel(
        product_ptr, label_ptr, loss_ptr, bias_ptr, row_stride, scale, factor, softcap,
        LOGITS: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DIFFERENTIATE: tl.constexpr,
        IGNORED: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
        ALIGNMENT: tl.constexpr,
    ):  # fmt: skip
        # Addresses: a 64-bit scalar for the row, 32-bit offsets inside it.
        BLOCK: tl.constexpr = GROUPS * VECTOR
        TILES: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        row = tl.program_id(0).to(tl.int64)
        product_row = product_ptr + tl.multiple_of(row * row_stride, ALIGNMENT)
        label = tl.load(label_ptr + row).to(tl.int32)
        place = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        if label == IGNORED:
            tl.store(loss_ptr + row, 0.0)
            if DIFFERENTIATE:
                zeros = tl.zeros([GROUPS, VECTOR], product_ptr.dtype.element_ty)
                for tile in range(TILES):
                    column = tile * BLOCK + place
                    tl.store(product_row + column, zeros, mask=column < WIDTH)
        else:
            in_range = (label >= 0) & (label < WIDTH)
            wanted = LOGITS(product_row, bias_ptr, label, in_range, factor, softcap, BIAS, SOFTCAP)[0]
            # Finite, for a group may have no column.
            largest = tl.full([GROUPS], -1e38, tl.float32)
            total = tl.zeros([GROUPS], tl.float32)
            for tile in range(TILES):
                column = tile * BLOCK + place
                z = LOGITS(product_row, bias_ptr, column, column < WIDTH, factor, softcap, BIAS, SOFTCAP)[0]
                larger = tl.maximum(largest, tl.max(z, axis=1))
                total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger[:, None]), axis=1)
                largest = larger
            largest_of_all = tl.max(largest, axis=0)
            total_of_all = tl.sum(total * tl.exp(largest - largest_of_all), axis=0)
            tl.store(loss_ptr + row, tl.log(total_of_all) + (largest_of_all - wanted))
            if DIFFERENTIATE:
                share = scale / total_of_all
                for tile in range(TILES):
                    column = (TILES - 1 - tile) * BLOCK + place
                    mask = column < WIDTH
                    z, slope = LOGITS(product_row, bias_ptr, column, mask, factor, softcap, BIAS, SOFTCAP)
                    grad = tl.exp(z - largest_of_all) * share
                    grad = tl.where(column == label, grad - scale, grad) * slope
                    tl.store(product_row + column, grad.to(product_ptr.dtype.element_ty), mask=mask)

    return _cross_entropy_kernel
