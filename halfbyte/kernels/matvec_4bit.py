"""Multiply a few tokens by up to three 4-bit weights on a GPU without writing them out: what decoding waits for.

    y_p[t, f] = sum_block absmax[f, block] * sum_(d in block) codebook[code[f, d]] * x[t, d]
                + bias[f] + sum_r B[f, r] * u[t, first_rank_p + r] + add[t, f]

Weights of one input are the members of one launch: a program takes a tile of rows of one of them. What else belongs to
the output is added to the fp32 sum before the one rounding: a launch of its own would cost as much as a small product.

A chunk is 32 weights of a row, four words of 32 bits: one 16-byte load of one thread, and within one block, whose
absmax multiplies the chunk's fp32 sum once. Sums stay with their thread until the end. Nothing is added atomically: the
same input gives the same bytes. Reading 0.5 bytes a weight, the work is as much in looking up codes as in memory: to
keep up with an H100's memory, a multiprocessor has to finish 25 weights a clock, with 128 instructions of lanes.

Two kernels: matvec_4bit_rows for one token and for fp32, matvec_4bit_tensor for several tokens of 16 bits.

Overlap: the launch may start while kernels before it still run ("programmatic dependent launch"). What never changes
during a step, the weights, is loaded at once, and then it waits until everything before it is complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch

from halfbyte.kernels.launch import launch as launch_kernel
from halfbyte.kernels.matvec_4bit_rows import rows_kernel
from halfbyte.kernels.matvec_4bit_tensor import mma_text, num_groups, tensor_kernel

WEIGHTS_PER_CHUNK = 32
MAX_MEMBERS = 3

# T tokens, F out_features of all members, M the most ranks of one member, R ranks of all


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecLaunch:
    """How the kernel is launched. Results differ by the order of fp32 sums, and by 2^-16 with `tensor`."""

    lookup: Literal["codes", "shuffle", "tensor"] = "shuffle"
    """Where the value of a code comes from. The interpreter knows codes alone; `tensor` takes x of 16 bits."""
    rows_per_program: int = 4
    """A power of two; 16 or 32 with `tensor`."""
    num_warps: int = 2
    prefetch: bool = False
    """Whether a step loads the next one's words before it works on its own, rather than after."""
    overlap: bool = False
    """Whether it may start while kernels before it still run."""
    ask_first: bool = False
    """With overlap: whether a program asks for all its words to come into the second-level cache before it waits."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecWeight:
    """The tensors of a 4-bit weight, (out_features, in_features)."""

    packed: torch.Tensor
    absmax: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    num_rows: int
    first_rank: int = 0
    """Where in u its adapter's ranks start."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecFormat:
    """What the members have in common."""

    dynamic_map: torch.Tensor
    codebook: torch.Tensor
    block_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecTerms:
    """What is added; of all members, one below the other."""

    bias_F: torch.Tensor | None = None
    B_FM: torch.Tensor | None = None
    """Adapters, with zeros beside those of fewer ranks."""
    u_TR: torch.Tensor | None = None
    """fp32; with B."""
    add_TF: torch.Tensor | None = None
    """For one member."""


def matvec_4bit(
    x: torch.Tensor,
    weights: Sequence[MatvecWeight],
    form: MatvecFormat,
    out: torch.Tensor,
    *,
    terms: MatvecTerms,
    launch: MatvecLaunch,
) -> None:
    """Write the members' products to `out`, one after the other, each (tokens, out_features).

    Args:
        x: (tokens, in_features), fp32, fp16 or bf16, contiguous, 16-byte aligned; in_features a multiple of block_size.
        weights: Up to MAX_MEMBERS, of the same number of columns, packed bytes 16-byte aligned.
        form: Theirs.
        out: Flat.
        terms: Contiguous.
        launch: How to launch.
    """
    num_chunks, is_tensor = x.shape[1] // WEIGHTS_PER_CHUNK, launch.lookup == "tensor"
    if is_tensor:
        kernel = tensor_kernel()
        more: dict[str, Any] = {"GROUPS": num_groups(x.shape[0], form.block_size)}
    else:
        kernel, functions = rows_kernel()
        more = {"EVEN": num_chunks % (32 * launch.num_warps) == 0, **functions}
    columns = 0 if terms.B_FM is None else terms.B_FM.shape[1]
    ranks = terms.u_TR.shape[1] if columns and terms.u_TR is not None else 0
    launch_kernel(
        kernel,
        sum(-(-w.num_rows // launch.rows_per_program) for w in weights),
        x.view(-1).view(torch.int32),
        *_member_arguments(weights),
        form.dynamic_map,
        form.codebook,
        *(out if term is None else term for term in (terms.bias_F, terms.B_FM, terms.u_TR, terms.add_TF)),
        out,
        num_chunks,
        num_warps=launch.num_warps,
        LOOKUP=mma_text(x.dtype, x.shape[0], form.block_size) if is_tensor else launch.lookup,
        X_DTYPE=_triton_dtype(x.dtype),
        TOKENS=x.shape[0],
        MEMBERS=len(weights),
        BIAS=terms.bias_F is not None,
        ADD=terms.add_TF is not None,
        COLUMNS=columns,
        RANKS=ranks,
        RANK_BLOCK=1 << max(columns - 1, 0).bit_length(),
        DOUBLE_QUANT=weights[0].scale is not None,
        CHUNKS_PER_BLOCK=form.block_size // WEIGHTS_PER_CHUNK,
        ROWS=launch.rows_per_program,
        THREADS=32 * launch.num_warps,
        PREFETCH=launch.prefetch,
        OVERLAP=launch.overlap,
        ASK_FIRST=launch.ask_first and launch.overlap,
        **more,
    )


def _member_arguments(weights: Sequence[MatvecWeight]) -> list[Any]:
    members = [*weights, *[weights[0]] * (MAX_MEMBERS - len(weights))]
    return [
        *(w.packed.view(-1).view(torch.int32) for w in members),
        *(w.absmax for w in members),
        *(w.absmax if w.scale is None else w.scale for w in members),
        *(w.absmax if w.offset is None else w.offset for w in members),
        *(w.num_rows for w in members),
        *(w.first_rank for w in members),
    ]


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
