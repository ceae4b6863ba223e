"""Root-mean-square norm on a GPU, one launch forward and one backward.

A program takes a tile of whole rows, [ROWS, BLOCK]: one row of a model's width, many rows of heads. The tile stays in
registers between the sum and the result, so that everything is read once. Of rows wider than MAX_BLOCK the first
chunk stays, and the others are read twice.

A tensor's rows are found by two strides, of tokens and of heads; a matrix has one head. An element's place, for
dropout, is that in the logical tensor.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from halfbyte.kernels.counter_dropout import HashDropout, dropout_arguments, keep_function
from halfbyte.kernels.launch import launch

MAX_BLOCK = 16384
# What a program takes of rows wider than that, at a time.
CHUNK = 4096
# Short rows are put together to tiles of so many elements.
ELEMENTS_PER_PROGRAM = 2048
ELEMENTS_PER_THREAD = 16


def rms_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    r: torch.Tensor,
    out: torch.Tensor,
    *,
    addend_: torch.Tensor | None,
    dropout: HashDropout | None,
) -> None:
    """Write `r`, contiguous, and the normalised `x`; arguments as those of the op."""
    addend = x if addend_ is None else addend_
    strides = _strides(x, out, addend)
    shape = _tile(x)
    launch(
        _forward_kernel(),
        -(-r.numel() // shape["ROWS"]),
        x,
        weight_D,
        r,
        out,
        addend,
        *strides,
        r.numel(),
        eps,
        *dropout_arguments(dropout, x),
        OFFSET=_offset_function(),
        LOAD=_load_sum_function(),
        STORE=_store_function(),
        KEEP=keep_function(),
        ADD=addend_ is not None,
        DROPOUT=dropout is not None,
        ALIGNMENT=math.gcd(*strides, 16),
        **shape,
    )


def rms_norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_D: torch.Tensor,
    r: torch.Tensor,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None,
    grad_adapter: torch.Tensor | None,
    dropout: HashDropout | None,
) -> None:
    """Write the gradient of x; arguments as those of the op, r contiguous."""
    tensors = grad_y, x, out, out if residual is None else residual, out if grad_adapter is None else grad_adapter
    strides = _strides(*tensors)
    shape = _tile(x)
    launch(
        _backward_kernel(),
        -(-r.numel() // shape["ROWS"]),
        *tensors,
        weight_D,
        r,
        *strides,
        r.numel(),
        *dropout_arguments(dropout, x),
        OFFSET=_offset_function(),
        LOAD=_load_function(),
        STORE=_store_gradient_function(),
        KEEP=keep_function(),
        RESIDUAL=residual is not None,
        ADAPTER=grad_adapter is not None,
        DROPOUT=dropout is not None,
        ALIGNMENT=math.gcd(*strides, 16),
        **shape,
    )


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Return for each tensor the stride of its tokens and that of its heads."""
    return tuple(stride for t in tensors for stride in (t.stride(0), t.stride(1) if t.ndim == 3 else 0))


def _tile(x: torch.Tensor) -> dict[str, int]:
    width = x.shape[-1]
    block = 1 << (width - 1).bit_length()
    if block > MAX_BLOCK:
        block = CHUNK
    rows = max(1, ELEMENTS_PER_PROGRAM // block)
    return {
        "HEADS": x.shape[1] if x.ndim == 3 else 1,
        "WIDTH": width,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": min(16, rows * block // (32 * ELEMENTS_PER_THREAD)),
    }


@functools.cache
def _offset_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _offset(row, token_stride, head_stride, HEADS: tl.constexpr, ALIGNMENT: tl.constexpr):
        """Return where the rows start, [ROWS, 1]; 64-bit, as `row` is."""
        offset = row // HEADS * token_stride + row % HEADS * head_stride if HEADS > 1 else row * token_stride
        return tl.multiple_of(offset, ALIGNMENT)[:, None]

    return _offset


@functools.cache
def _load_sum_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _load_sum(column, in_range, x_ptr, addend_ptr, ADD: tl.constexpr, WIDTH: tl.constexpr):
        """Return a chunk of x plus addend, rounded as it is stored."""
        mask = in_range & (column < WIDTH)
        x = tl.load(x_ptr + column, mask=mask, other=0).to(tl.float32)
        if ADD:
            x += tl.load(addend_ptr + column, mask=mask, other=0).to(tl.float32)
            x = x.to(addend_ptr.dtype.element_ty).to(tl.float32)
        return x

    return _load_sum


@functools.cache
def _store_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _store(
        x, r, column, in_range, place, weight_ptr, out_ptr, addend_ptr, base_ptr, has_base, seed, threshold,
        KEEP: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Store a chunk of normalised rows, and of the sum."""
        mask = in_range & (column < WIDTH)
        if ADD:
            tl.store(addend_ptr + column, x.to(addend_ptr.dtype.element_ty), mask=mask)
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0).to(tl.float32)
        y = x * r * weight
        if DROPOUT:
            y = tl.where(KEEP(place + column.to(tl.uint32), base_ptr, has_base, seed, threshold), y, 0.0)
        tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), mask=mask)

    return _store


@functools.cache
def _forward_kernel() -> Any:
    import triton
    import triton.language as tl

    strides = ["x_token", "x_head", "out_token", "out_head", "addend_token", "addend_head"]

    @triton.jit(do_not_specialize=[*strides, "num_rows", "has_base", "seed", "threshold"])
    def _rms_norm_kernel(
        x_ptr, weight_ptr, r_ptr, out_ptr, addend_ptr,
        x_token, x_head, out_token, out_head, addend_token, addend_head, num_rows, eps,
        base_ptr, has_base, seed, threshold,
        OFFSET: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, KEEP: tl.constexpr,
        ADD: tl.constexpr, DROPOUT: tl.constexpr,
        ALIGNMENT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Addresses: 64 bits for the rows, 32-bit offsets inside them.
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        in_range = (row < num_rows)[:, None]
        place = (row * WIDTH).to(tl.uint32)[:, None]
        x_row = x_ptr + OFFSET(row, x_token, x_head, HEADS, ALIGNMENT)
        out_row = out_ptr + OFFSET(row, out_token, out_head, HEADS, ALIGNMENT)
        addend_row = addend_ptr + OFFSET(row, addend_token, addend_head, HEADS, ALIGNMENT)

        column = tl.arange(0, BLOCK)[None, :]
        x = LOAD(column, in_range, x_row, addend_row, ADD, WIDTH)
        total = tl.sum(x * x, axis=1)
        if WIDTH > BLOCK:
            start = BLOCK
            while start < WIDTH:
                more = LOAD(start + column, in_range, x_row, addend_row, ADD, WIDTH)
                total += tl.sum(more * more, axis=1)
                start += BLOCK
        r = tl.rsqrt(total / WIDTH + eps)
        tl.store(r_ptr + row, r, mask=row < num_rows)

        r = r[:, None]
        STORE(
            x, r, column, in_range, place, weight_ptr, out_row, addend_row, base_ptr, has_base, seed, threshold,
            KEEP, ADD, DROPOUT, WIDTH,
        )  # fmt: skip
        if WIDTH > BLOCK:
            start = BLOCK
            while start < WIDTH:
                # The sum of a chunk is stored after its last read: it may overwrite the addend.
                more = LOAD(start + column, in_range, x_row, addend_row, ADD, WIDTH)
                STORE(
                    more, r, start + column, in_range, place, weight_ptr, out_row, addend_row,
                    base_ptr, has_base, seed, threshold, KEEP, ADD, DROPOUT, WIDTH,
                )  # fmt: skip
                start += BLOCK

    return _rms_norm_kernel


@functools.cache
def _load_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _load(
        column, in_range, place, weight_ptr, x_ptr, grad_ptr, adapter_ptr, base_ptr, has_base, seed, threshold,
        KEEP: tl.constexpr, ADAPTER: tl.constexpr, DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Return a chunk of x, and of grad_y times the weight."""
        mask = in_range & (column < WIDTH)
        x = tl.load(x_ptr + column, mask=mask, other=0).to(tl.float32)
        grad = tl.load(grad_ptr + column, mask=mask, other=0).to(tl.float32)
        if ADAPTER:
            adapter = tl.load(adapter_ptr + column, mask=mask, other=0).to(tl.float32)
            if DROPOUT:
                keep = KEEP(place + column.to(tl.uint32), base_ptr, has_base, seed, threshold)
                adapter = tl.where(keep, adapter, 0.0)
            grad += adapter
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0).to(tl.float32)
        return x, grad * weight

    return _load


@functools.cache
def _store_gradient_function() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _store_gradient(
        x, weighted, r, mean, column, in_range, out_ptr, residual_ptr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr
    ):
        """Store a chunk of the gradient of x."""
        mask = in_range & (column < WIDTH)
        grad = r * (weighted - x * (r * r * mean))
        if RESIDUAL:
            grad += tl.load(residual_ptr + column, mask=mask, other=0).to(tl.float32)
        tl.store(out_ptr + column, grad.to(out_ptr.dtype.element_ty), mask=mask)

    return _store_gradient


@functools.cache
def _backward_kernel() -> Any:
    import triton
    import triton.language as tl

    strides = [f"{name}_{axis}" for name in ("grad", "x", "out", "residual", "adapter") for axis in ("token", "head")]

    @triton.jit(do_not_specialize=[*strides, "num_rows", "has_base", "seed", "threshold"])
    def _rms_norm_backward_kernel(
        grad_ptr, x_ptr, out_ptr, residual_ptr, adapter_ptr, weight_ptr, r_ptr,
        grad_token, grad_head, x_token, x_head, out_token, out_head, residual_token, residual_head,
        adapter_token, adapter_head, num_rows, base_ptr, has_base, seed, threshold,
        OFFSET: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, KEEP: tl.constexpr,
        RESIDUAL: tl.constexpr, ADAPTER: tl.constexpr, DROPOUT: tl.constexpr,
        ALIGNMENT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        in_range = (row < num_rows)[:, None]
        place = (row * WIDTH).to(tl.uint32)[:, None]
        grad_row = grad_ptr + OFFSET(row, grad_token, grad_head, HEADS, ALIGNMENT)
        x_row = x_ptr + OFFSET(row, x_token, x_head, HEADS, ALIGNMENT)
        out_row = out_ptr + OFFSET(row, out_token, out_head, HEADS, ALIGNMENT)
        residual_row = residual_ptr + OFFSET(row, residual_token, residual_head, HEADS, ALIGNMENT)
        adapter_row = adapter_ptr + OFFSET(row, adapter_token, adapter_head, HEADS, ALIGNMENT)
        r = tl.load(r_ptr + row, mask=row < num_rows, other=0)[:, None]

        column = tl.arange(0, BLOCK)[None, :]
        x, weighted = LOAD(
            column, in_range, place, weight_ptr, x_row, grad_row, adapter_row,
            base_ptr, has_base, seed, threshold, KEEP, ADAPTER, DROPOUT, WIDTH,
        )  # fmt: skip
        total = tl.sum(x * weighted, axis=1)
        if WIDTH > BLOCK:
            start = BLOCK
            while start < WIDTH:
                more, more_weighted = LOAD(
                    start + column, in_range, place, weight_ptr, x_row, grad_row, adapter_row,
                    base_ptr, has_base, seed, threshold, KEEP, ADAPTER, DROPOUT, WIDTH,
                )  # fmt: skip
                total += tl.sum(more * more_weighted, axis=1)
                start += BLOCK

        mean = (total / WIDTH)[:, None]
        STORE(x, weighted, r, mean, column, in_range, out_row, residual_row, RESIDUAL, WIDTH)
        if WIDTH > BLOCK:
            start = BLOCK
            while start < WIDTH:
                more, more_weighted = LOAD(
                    start + column, in_range, place, weight_ptr, x_row, grad_row, adapter_row,
                    base_ptr, has_base, seed, threshold, KEEP, ADAPTER, DROPOUT, WIDTH,
                )  # fmt: skip
                STORE(more, more_weighted, r, mean, start + column, in_range, out_row, residual_row, RESIDUAL, WIDTH)
                start += BLOCK

    return _rms_norm_backward_kernel
