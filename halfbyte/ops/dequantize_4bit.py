"""Restore a weight from 4 bits."""

from __future__ import annotations

import torch

from halfbyte.quant.codebooks import codebook_values, dynamic_map
from halfbyte.quant.tensor import ABSMAX_GROUP, QuantizedTensor


def dequantize_4bit(
    q: QuantizedTensor, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Restore a weight from 4 bits.

    Args:
        q: The weight in 4 bits.
        dtype: Of the result; that of `out` or of the original weight unless given.
        out: Buffer of q's shape to write to, contiguous or with a larger row stride.
        backend: "auto", "torch" or "triton".
    """
    dtype = dtype or (out.dtype if out is not None else q.dtype)
    weight = dequantize_4bit_reference(q, dtype=dtype)
    return weight if out is None else out.copy_(weight)


def dequantize_4bit_reference(
    q: QuantizedTensor, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Restore a weight from 4 bits, in plain torch."""
    values = codebook_values(q.codebook).to(q.device)
    codes = torch.stack([q.packed >> 4, q.packed & 15], dim=1).view(-1)[: q.numel]
    padding = -q.numel % q.block_size
    blocks = torch.nn.functional.pad(values[codes.long()], (0, padding)).view(-1, q.block_size)
    flat = (blocks * restore_absmax_reference(q)[:, None]).view(-1)[: q.numel]
    weight = flat.view(q.shape).to(dtype or (out.dtype if out is not None else q.dtype))
    return weight if out is None else out.copy_(weight)


def restore_absmax_reference(q: QuantizedTensor) -> torch.Tensor:
    """Return absmax in fp32, undoing double quantisation: multiply, round, add, round."""
    if q.absmax_scale is None or q.absmax_offset is None:
        return q.absmax
    restored = dynamic_map(True).to(q.device)[q.absmax.long()]
    padding = -restored.numel() % ABSMAX_GROUP
    groups = torch.nn.functional.pad(restored, (0, padding)).view(-1, ABSMAX_GROUP)
    return (groups * q.absmax_scale[:, None]).view(-1)[: restored.numel()] + q.absmax_offset
