"""Rows of a base weight in fp32, a few at a time, whatever form it is in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from halfbyte.ops import dequantize_4bit
from halfbyte.quant import QuantizedTensor
from halfbyte.quant.tensor import ABSMAX_GROUP

# Elements worked on at once: 1 MB in fp32, and several times that in temporaries.
BLOCK_ELEMENTS = 1 << 18


def iter_base_rows(weight: torch.Tensor | QuantizedTensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield consecutive rows of a weight, as a slice and their values in fp32."""
    num_rows, width = weight.shape
    step = _rows_at_once(weight, width)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        if isinstance(weight, QuantizedTensor):
            yield rows, dequantize_4bit(_quantized_rows(weight, rows), dtype=torch.float32)
        else:
            yield rows, weight[rows].float()


def update_of_rows(
    values: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, *, scaling: float, magnitude: torch.Tensor | None
) -> torch.Tensor:
    """Return what an adapter adds to some rows of a base weight, in fp32.

    Args:
        values: The rows, (rows, in_features), fp32.
        lora_A: (rank, in_features).
        lora_B: The same rows of it, (rows, rank).
        scaling: Of their product.
        magnitude: With DoRA the lengths that the rows get, (rows,).
    """
    update = (lora_B.float() @ lora_A.float()).mul_(scaling)
    if magnitude is None:
        return update
    turned = values + update
    gain = magnitude.float() / torch.linalg.vector_norm(turned, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return turned.mul_(gain[:, None]).sub_(values)


def _rows_at_once(weight: torch.Tensor | QuantizedTensor, width: int) -> int:
    step = max(1, BLOCK_ELEMENTS // width)
    if not isinstance(weight, QuantizedTensor):
        return step
    # Rows can be cut off only where a block of elements, and with double quantisation a group of blocks, ends as well.
    group_elements = weight.block_size * (ABSMAX_GROUP if weight.double_quant else 1)
    unit = group_elements // math.gcd(width, group_elements)
    return unit * max(1, step // unit)


def _quantized_rows(q: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Return some rows of a 4-bit weight; they begin where a block, or a group of blocks, begins."""
    width = q.shape[1]
    first, end = rows.start * width, rows.stop * width
    blocks = slice(first // q.block_size, -(-end // q.block_size))
    scale = q.absmax_scale
    if scale is not None:
        scale = scale[blocks.start // ABSMAX_GROUP : -(-blocks.stop // ABSMAX_GROUP)]
    return dataclasses.replace(
        q,
        packed=q.packed[first // 2 : -(-end // 2)],
        absmax=q.absmax[blocks],
        absmax_scale=scale,
        shape=(rows.stop - rows.start, width),
    )
