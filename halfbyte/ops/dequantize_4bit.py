"""Restore a weight from 4 bits.

    absmax = dynamic_map[absmax_code] * absmax_scale[block // 256] + absmax_offset    (with double quantisation)
    w = round_to_dtype(codebook[code] * absmax)

The arithmetic is fp32, each step rounded by itself (no fused multiply-add), so that fp32 results equal those of
bitsandbytes bit for bit, and 16-bit results are these rounded once.

Training restores every frozen weight before each product and forgets it at once, so the result goes into a buffer
that the caller reuses. On a GPU that buffer may be wider than the weight (a row stride larger than the row), which
leaves room for an adapter's columns beside it.

A packed byte holds two codes, so one lookup in a table of 256 pairs restores two elements. On a CPU that lookup is an
8-byte gather, the fastest that torch has, over chunks that stay in the cores' caches.
"""

from __future__ import annotations

import functools

import torch

from halfbyte.kernels import dequantize_4bit as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.codebooks import code_pairs, codebook_values, dynamic_map
from halfbyte.quant.tensor import ABSMAX_GROUP, QuantizedTensor

# Scratch is 8 bytes an element; much smaller chunks pay more for calling torch than for the work.
ELEMENTS_PER_THREAD = 1 << 17
# Rows that a lookup is spread over; torch looks up each row on one thread.
LOOKUP_ROWS = 16


def dequantize_4bit(
    q: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Restore a weight from 4 bits.

    Args:
        q: The weight in 4 bits.
        dtype: fp32, fp16 or bf16; that of `out`, or the weight's own, unless given.
        out: Buffer of the weight's shape to write to: contiguous, or a matrix with a larger row stride.
        backend: "auto" (by device), "torch" or "triton".
        workspace: Where the CPU path takes its scratch from, a few MB; allocated and freed unless given.

    Returns:
        `out`, or a new tensor.

    Raises:
        BackendError: The backend is unknown or cannot run on the weight's device.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    assert out.shape == q.shape, f"out has shape {tuple(out.shape)}, the weight {q.shape}"
    assert dtype in (None, out.dtype)
    assert out.is_contiguous() or (out.ndim == 2 and out.stride(1) == 1), "rows of out must be contiguous"
    if resolve_backend("dequantize_4bit", backend, q.device) == "triton":
        return dequantize_4bit_triton(q, out, launch=kernels.DequantizeLaunch())
    if q.device.type == "cpu":
        return _dequantize_cpu(q, out, workspace or Workspace())
    return out.copy_(dequantize_4bit_reference(q, dtype=out.dtype))


def dequantize_4bit_reference(
    q: QuantizedTensor, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Restore a weight from 4 bits: the definition, in plain torch on any device."""
    codes = torch.stack([q.packed >> 4, q.packed & 15], dim=1).view(-1)[: q.numel]
    values = codebook_values(q.codebook, q.device)[codes.int()]
    absmax = restore_absmax_reference(q).repeat_interleave(q.block_size)[: q.numel]
    weight = (values * absmax).view(q.shape)
    return weight.to(dtype or q.dtype) if out is None else out.copy_(weight)


def restore_absmax_reference(q: QuantizedTensor) -> torch.Tensor:
    """Return absmax in fp32, double quantisation undone: multiply, round, add, round."""
    if q.absmax_scale is None or q.absmax_offset is None:
        return q.absmax
    scale = q.absmax_scale.repeat_interleave(ABSMAX_GROUP)[: q.absmax.numel()]
    return dynamic_map(True, q.device)[q.absmax.int()] * scale + q.absmax_offset


def dequantize_4bit_triton(q: QuantizedTensor, out: torch.Tensor, *, launch: kernels.DequantizeLaunch) -> torch.Tensor:
    """Restore a weight from 4 bits with the Triton kernel, launched as told, into `out`."""
    scales = kernels.Scales(q.absmax, q.absmax_scale, q.absmax_offset, dynamic_map(True, q.device))
    table = _kernel_table(q.codebook, launch.lookup, out.dtype, q.device)
    kernels.dequantize_4bit(q.packed, scales, table, out, block_size=q.block_size, launch=launch)
    return out


@functools.cache
def _kernel_table(codebook: str, lookup: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if lookup == "codes":
        return codebook_values(codebook, device)
    return code_pairs(codebook, device).to(dtype if lookup == "rounded" else torch.float32)


def _dequantize_cpu(q: QuantizedTensor, out: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    absmax = _restore_absmax_cpu(q).unsqueeze(1)
    # Chunks of equal size: a short last one would be looked up whole all the same.
    num_chunks = -(-q.numel // (ELEMENTS_PER_THREAD * torch.get_num_threads()))
    num_blocks = -(-absmax.numel() // num_chunks)
    numel = num_blocks * q.block_size
    index = workspace.take("dequantize_4bit_index", (numel // 2,), dtype=torch.int64, device=q.device)
    pairs = workspace.take("dequantize_4bit_values", (numel // 2,), dtype=torch.int64, device=q.device)
    values = pairs.view(torch.float32)
    value_blocks = values.view(num_blocks, q.block_size)
    # A pair of fp32 values moves as one 8-byte integer.
    table_rows = code_pairs(q.codebook).view(torch.int64).view(1, -1).expand(LOOKUP_ROWS, -1)
    index_rows, pair_rows = index.view(LOOKUP_ROWS, -1), pairs.view(LOOKUP_ROWS, -1)
    flat = out.view(-1) if out.is_contiguous() else torch.empty(q.numel, dtype=out.dtype, device=q.device)
    # Splitting into all chunks at once is much cheaper than slicing each.
    chunks = zip(q.packed.split(numel // 2), absmax.split(num_blocks), flat.split(numel), strict=True)
    for packed, part, target in chunks:
        if target.numel() == numel:
            index.copy_(packed)
        else:
            index.zero_()[: packed.numel()].copy_(packed)
        torch.gather(table_rows, 1, index_rows, out=pair_rows)
        if target.numel() == numel and target.dtype == torch.float32:
            torch.mul(value_blocks, part, out=target.view_as(value_blocks))
        else:
            value_blocks[: part.numel()].mul_(part)
            target.copy_(values[: target.numel()])
    return out if out.is_contiguous() else out.copy_(flat.view(q.shape))


def _restore_absmax_cpu(q: QuantizedTensor) -> torch.Tensor:
    if q.absmax_scale is None or q.absmax_offset is None:
        return q.absmax
    restored = dynamic_map(True)[q.absmax.int()]
    num_whole_groups = restored.numel() // ABSMAX_GROUP
    whole, rest = restored.tensor_split([num_whole_groups * ABSMAX_GROUP])
    whole.view(-1, ABSMAX_GROUP).mul_(q.absmax_scale[:num_whole_groups].unsqueeze(1))
    rest.mul_(q.absmax_scale[num_whole_groups:])
    return restored.add_(q.absmax_offset)
