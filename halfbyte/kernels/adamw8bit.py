"""AdamW for any number of tensors in one launch, with 8-bit or 32-bit moments.

A program updates `BLOCKS` blocks of 256 elements of one tensor. Tables on the device say which: `programs` names a
tensor and a first block, `tensors` its numel, first block in the slab and parameter group, `addresses` where the
parameter and its gradient lie. Addresses are 64-bit integers which the kernel turns into pointers, so tensors stay
where they are, and only the gradients' row changes from step to step. Address 0 means no gradient: the program does
nothing.

Step counts live on the device, because a step that `skip` cancels must not count and the host does not wait to hear
of it. `steps` has two rows, read from one and written to the other, and the host swaps the rows at each launch: a
program would otherwise read what another has already advanced.

Group numbers (lr, betas, eps, weight decay) come in fp64 and bias corrections are computed in fp64, once a program:
1 - beta2^t in fp32 would be wrong in its fifth digit at the first step. Everything an element goes through is fp32
with IEEE division and square root and no fused multiply-add but the ones written out: the roundings of torch's own
vectorised operations on a CPU.

Traffic: 12 bytes an element for an fp32 parameter and its gradient, 4 for both moments in 8 bits; the tables cost a
program of 1024 elements some 100 bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

BLOCK_SIZE = 256
# Of the pairs tried on an H100 the one that is good for both widths: 0.41 ms for 40 M parameters in 8 bits, 0.38 in 32.
BLOCKS_PER_PROGRAM = 4
NUM_WARPS = 2


@dataclasses.dataclass(slots=True)
class AdamWTables:
    """What stays the same from launch to launch, on the device."""

    programs: torch.Tensor
    """int32 [num_programs, 2]: tensor, first block within it."""
    tensors: torch.Tensor
    """int64 [num_tensors, 3]: numel, first block in the slab, group."""
    steps: torch.Tensor
    """int32 [2, num_tensors]: steps taken, the row of this launch and the row of the next."""
    row: int = 0
    """Which row of `steps` is valid."""


@dataclasses.dataclass(frozen=True, slots=True)
class Moments:
    """The slab, on the device or in pinned host memory."""

    m: torch.Tensor
    """[K, 256] uint8 codes, or fp32."""
    v: torch.Tensor
    m_absmax: torch.Tensor | None
    """fp32 [K] where m and v are codes."""
    v_absmax: torch.Tensor | None


@dataclasses.dataclass(frozen=True, slots=True)
class CodeTables:
    """The signed map in row 0 and the unsigned one in row 1, on the device."""

    values: torch.Tensor
    """fp32 [2, 256]."""
    codes: torch.Tensor
    """uint8 [2, 65536], of evenly spaced numbers from -1 to 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchInputs:
    """What may change from launch to launch."""

    addresses: torch.Tensor
    """int64 [2, num_tensors] on the device: parameters, gradients."""
    hyper: torch.Tensor
    """fp64 [num_groups, 8] on the device: lr, beta1, beta2, log(beta1), log(beta2), eps, weight_decay, 0."""
    grad_scale: torch.Tensor | None
    skip: torch.Tensor | None
    dtype: torch.dtype
    """Of parameters and gradients."""
    aligned: bool
    """Whether all addresses and numels are multiples of 16, so that loads can be wide."""


def build_tables(
    numels: Sequence[int], first_blocks: Sequence[int], group_of: Sequence[int], *, device: torch.device
) -> AdamWTables:
    """Lay out one program for each `BLOCKS_PER_PROGRAM` blocks of each tensor."""
    programs = [
        (tensor, block)
        for tensor, numel in enumerate(numels)
        for block in range(0, -(-numel // BLOCK_SIZE), BLOCKS_PER_PROGRAM)
    ]
    tensors = list(zip(numels, first_blocks, group_of, strict=True))
    return AdamWTables(
        programs=torch.tensor(programs, dtype=torch.int32, device=device).view(-1, 2),
        tensors=torch.tensor(tensors, dtype=torch.int64, device=device).view(-1, 3),
        steps=torch.zeros(2, len(tensors), dtype=torch.int32, device=device),
    )


def adamw8bit(tables: AdamWTables, moments: Moments, codes: CodeTables | None, inputs: LaunchInputs) -> None:
    """Update all tensors of `tables`, and turn its step rows over.

    Args:
        tables: Which program does what.
        moments: Changed.
        codes: Where the moments are codes.
        inputs: Addresses and numbers of this step.
    """
    import triton.language as tl

    num_programs, num_tensors = len(tables.programs), len(tables.tensors)
    if num_programs == 0:
        return
    none = tables.steps
    element = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[inputs.dtype]
    with torch.cuda.device_of(tables.programs):
        _kernel()[(num_programs,)](
            tables.programs,
            tables.tensors,
            inputs.addresses,
            tables.steps,
            inputs.hyper,
            none if inputs.grad_scale is None else inputs.grad_scale,
            none if inputs.skip is None else inputs.skip,
            moments.m,
            moments.v,
            none if moments.m_absmax is None else moments.m_absmax,
            none if moments.v_absmax is None else moments.v_absmax,
            none if codes is None else codes.values,
            none if codes is None else codes.codes,
            num_tensors,
            tables.row,
            ELEMENT=element,
            ALIGNED=inputs.aligned,
            HAS_SCALE=inputs.grad_scale is not None,
            HAS_SKIP=inputs.skip is not None,
            IN_8BIT=codes is not None,
            BLOCKS=BLOCKS_PER_PROGRAM,
            GROUP_SCALARS=_group_scalars(),
            LOAD_MOMENT=_load_moment(),
            STORE_MOMENT=_store_moment(),
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    tables.row = 1 - tables.row


@functools.cache
def _kernel() -> Any:
    # The functions it calls are arguments: the interpreter does not see the names around a nested function.
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_tensors", "row"])
    def _adamw8bit_kernel(
        program_ptr, tensor_ptr, address_ptr, step_ptr, hyper_ptr, scale_ptr, skip_ptr,
        m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, value_ptr, code_ptr, num_tensors, row,
        ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
        IN_8BIT: tl.constexpr, BLOCKS: tl.constexpr,
        GROUP_SCALARS: tl.constexpr, LOAD_MOMENT: tl.constexpr, STORE_MOMENT: tl.constexpr,
    ):  # fmt: skip
        tensor = tl.load(program_ptr + 2 * tl.program_id(0))
        block = tl.load(program_ptr + 2 * tl.program_id(0) + 1)
        grad_address = tl.load(address_ptr + num_tensors + tensor)
        active = grad_address != 0
        if HAS_SKIP:
            active = active & (tl.load(skip_ptr) == 0)
        step = tl.load(step_ptr + row * num_tensors + tensor) + active.to(tl.int32)
        if block == 0:
            tl.store(step_ptr + (1 - row) * num_tensors + tensor, step)
        if active:
            numel = tl.load(tensor_ptr + 3 * tensor)
            group = tl.load(tensor_ptr + 3 * tensor + 2)
            beta1, rest1, beta2, rest2, keep, rate, c2, eps = GROUP_SCALARS(hyper_ptr + 8 * group, step, IN_8BIT)
            blocks = block + tl.arange(0, BLOCKS)
            elements = blocks.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
            param_ptr = tl.load(address_ptr + tensor).to(tl.pointer_type(ELEMENT))
            grad_ptr = grad_address.to(tl.pointer_type(ELEMENT))
            if ALIGNED:
                param_ptr = tl.multiple_of(param_ptr, 16)
                grad_ptr = tl.multiple_of(grad_ptr, 16)
                numel = tl.multiple_of(numel, 16)
            param = tl.load(param_ptr + elements, mask=elements < numel, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + elements, mask=elements < numel, other=0.0).to(tl.float32)
            if HAS_SCALE:
                grad = tl.div_rn(grad, tl.load(scale_ptr).to(tl.float32))
            # Padding of a tensor's last block is its own; the blocks after that are the next tensor's.
            inside = blocks * 256 < numel
            rows = tl.load(tensor_ptr + 3 * tensor + 1) + blocks
            m = LOAD_MOMENT(m_ptr, m_absmax_ptr, rows, inside, value_ptr, IN_8BIT)
            v = LOAD_MOMENT(v_ptr, v_absmax_ptr, rows, inside, value_ptr + 256, IN_8BIT)
            m = tl.fma(grad, rest1, m * beta1)
            v = tl.fma(grad * rest2, grad, v * beta2)
            param = param * keep
            if IN_8BIT:
                param += tl.div_rn(m * rate, tl.div_rn(tl.sqrt_rn(v), c2) + eps)
            else:
                param = tl.fma(tl.div_rn(m, tl.sqrt_rn(v) + eps), rate, param)
            tl.store(param_ptr + elements, param.to(ELEMENT), mask=elements < numel)
            # A code of zero comes back as a little more than zero, which must not become a block's largest magnitude.
            m = tl.where(elements < numel, m, 0.0)
            v = tl.where(elements < numel, v, 0.0)
            STORE_MOMENT(m, m_ptr, m_absmax_ptr, rows, inside, code_ptr, IN_8BIT)
            STORE_MOMENT(v, v_ptr, v_absmax_ptr, rows, inside, code_ptr + 65536, IN_8BIT)

    return _adamw8bit_kernel


@functools.cache
def _group_scalars() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _group_scalars_kernel(hyper_ptr, step, IN_8BIT: tl.constexpr):
        """Return beta1, 1 - beta1, beta2, 1 - beta2, weight decay's factor, step size, c2 and eps, in fp32."""
        lr, beta1, beta2 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
        eps, weight_decay = tl.load(hyper_ptr + 5), tl.load(hyper_ptr + 6)
        c1 = 1.0 - tl.exp(step.to(tl.float64) * tl.load(hyper_ptr + 3))
        c2 = tl.sqrt(1.0 - tl.exp(step.to(tl.float64) * tl.load(hyper_ptr + 4)))
        rate = -lr / c1
        if not IN_8BIT:
            rate = -lr * c2 / c1
            eps = eps * c2
        keep = 1.0 - lr * weight_decay
        f32 = tl.float32
        return (
            beta1.to(f32), (1.0 - beta1).to(f32), beta2.to(f32), (1.0 - beta2).to(f32),
            keep.to(f32), rate.to(f32), c2.to(f32), eps.to(f32),
        )  # fmt: skip

    return _group_scalars_kernel


@functools.cache
def _load_moment() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _load_moment_kernel(ptr, absmax_ptr, rows, inside, value_ptr, IN_8BIT: tl.constexpr):
        """Load rows of the slab in fp32; rows that are not inside give 0."""
        slab = rows[:, None] * 256 + tl.arange(0, 256)[None, :]
        stored = tl.load(ptr + slab, mask=inside[:, None], other=0)
        if IN_8BIT:
            absmax = tl.load(absmax_ptr + rows, mask=inside, other=0.0)
            return tl.load(value_ptr + stored.to(tl.int32)) * absmax[:, None]
        else:
            return stored

    return _load_moment_kernel


@functools.cache
def _store_moment() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _store_moment_kernel(x, ptr, absmax_ptr, rows, inside, code_ptr, IN_8BIT: tl.constexpr):
        """Store rows of the slab, as codes and absmax or as they are."""
        slab = rows[:, None] * 256 + tl.arange(0, 256)[None, :]
        if IN_8BIT:
            absmax = tl.max(tl.abs(x), axis=1)
            x = x * tl.div_rn(1.0, absmax)[:, None]
            # Not a number takes code 0, as 0 / 0 does in a block of zeros.
            x = tl.where(x == x, tl.minimum(tl.maximum(x, -1.0), 1.0), -1.0)
            index = tl.fma(x + 1.0, 32767.5, 0.5).to(tl.int32)
            tl.store(absmax_ptr + rows, absmax, mask=inside)
            tl.store(ptr + slab, tl.load(code_ptr + index), mask=inside[:, None])
        else:
            tl.store(ptr + slab, x, mask=inside[:, None])

    return _store_moment_kernel
