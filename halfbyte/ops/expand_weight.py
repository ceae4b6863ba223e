"""Make a frozen weight ready for a product: expanded from 4 bits, or as it is, in the compute dtype.

    W = expand(weight), valid until the workspace's buffer is taken again

A 4-bit weight has no product of its own in torch, so it is written in 16 (or 32) bits into one buffer that every
layer of the model shares, and used at once. Nothing of it is kept: the backward expands it again. That costs one more
expansion a step (about 2% of a product over 2048 tokens) and saves holding the whole model in 16 bits, which is the
point of QLoRA (Dettmers et al., arXiv 2305.14314, section 3).

A plain weight that is stored in another dtype than the product's is cast into the same buffer.

A weight that lives on another device than the product (in host memory, that is) is copied there first, for as long as
it takes to expand it.
"""

from __future__ import annotations

import torch

from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantizedTensor

FrozenWeight = QuantizedTensor | torch.Tensor
WEIGHT_BUFFER = "expanded_weight"


def expand_weight(
    weight: FrozenWeight,
    *,
    dtype: torch.dtype,
    workspace: Workspace,
    device: torch.device | None = None,
    spare_columns: int = 0,
) -> torch.Tensor:
    """Return a frozen weight in the compute dtype.

    Args:
        weight: (out_features, in_features), in 4 bits or plain.
        dtype: The compute dtype.
        workspace: Owns the buffer that is written to unless the weight is plain, of that dtype, and alone.
        device: Where the product runs; None is where the weight is.
        spare_columns: Room beside the weight, for the caller to fill.

    Returns:
        A tensor to use before the next expansion in the same workspace, and not to keep.
    """
    device = device or weight.device
    if weight.device != device:
        weight = weight.to(device, non_blocking=True)
    if spare_columns:
        shape = (weight.shape[0], weight.shape[1] + spare_columns)
        wide_FE = workspace.take(WEIGHT_BUFFER, shape, dtype=dtype, device=device)
        target_FD = wide_FE[:, : weight.shape[1]]
        if isinstance(weight, torch.Tensor):
            target_FD.copy_(weight.detach())
        else:
            dequantize_4bit(weight, out=target_FD, workspace=workspace)
        return wide_FE
    if isinstance(weight, torch.Tensor):
        if weight.dtype == dtype:
            return weight.detach()
        buffer = workspace.take(WEIGHT_BUFFER, tuple(weight.shape), dtype=dtype, device=device)
        return buffer.copy_(weight.detach())
    buffer = workspace.take(WEIGHT_BUFFER, weight.shape, dtype=dtype, device=device)
    return dequantize_4bit(weight, out=buffer, workspace=workspace)
