"""A linear layer whose weight and adapter are rounded to 4 bits together, for adapters that will be put back so.

    y = x Q(W + s B A)' + b        Q: to 4 bits and back, scales found anew

    grad_x = grad_y Q(W + s B A)        grad_B = s grad_y' x A'        grad_A = s (grad_y B)' x

Rounding has no slope to follow, so the gradient of the rounded weight is taken for that of the weight before rounding
(straight through). What is left for A and B are then the products of an ordinary adapter: no gradient of a weight is
ever made. The loss sees the rounded weight, so that merging and rounding once more changes nothing.

W must be the weight before it was ever rounded. One that lies on the grid already is in the middle between two
decisions, and an adapter moves it by far less than half a step: nothing would change, for a long time.

Kept for the backward: x. The weight is rounded again there, one pass over it more. There is no dropout, since a merged
weight has none.

Price: base weights in 16 bits, and each of them quantised twice a step.

Source: Bengio et al., straight-through estimator, arXiv 1308.3432; on merged adapters: QA-LoRA, arXiv 2309.14717, and
L4Q, arXiv 2402.04902, for other grids.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from halfbyte.ops.dequantize_4bit import dequantize_4bit, dequantize_4bit_reference
from halfbyte.ops.lora_linear import product_in
from halfbyte.ops.quantize_4bit import quantize_4bit, quantize_4bit_reference
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantSpec

# T tokens, D in_features, F out_features, R rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """How weight and adapter are put together."""

    scaling: float
    """Factor of the product of lora_B and lora_A."""
    spec: QuantSpec


def lora_rounded(
    x: torch.Tensor,
    weight_FD: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    rounding: Rounding,
    workspace: Workspace,
) -> torch.Tensor:
    """Multiply by a frozen weight and its adapter, rounded to 4 bits together.

    Args:
        x: (..., in_features). Its dtype is the compute dtype.
        weight_FD: (out_features, in_features), as it was before any rounding to 4 bits; gets no gradient.
        bias: (out_features,) or None, frozen.
        lora_A: (rank, in_features), fp32.
        lora_B: (out_features, rank), fp32.
        rounding: Scaling, and the 4-bit form.
        workspace: Scratch buffers of the model.

    Returns:
        (..., out_features) in the compute dtype.
    """
    x_TD = x.reshape(-1, x.shape[-1])
    y_TF = _LoraRounded.apply(x_TD, lora_A, lora_B, weight_FD, bias, rounding, workspace)
    return y_TF.view(*x.shape[:-1], y_TF.shape[-1])


def lora_rounded_reference(
    x: torch.Tensor,
    weight_FD: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    rounding: Rounding,
) -> torch.Tensor:
    """Do the same in plain torch, with autograd's gradient of the straight-through formula."""
    merged_FD = weight_FD.float() + rounding.scaling * (lora_B @ lora_A)
    rounded_FD = dequantize_4bit_reference(quantize_4bit_reference(merged_FD, rounding.spec), dtype=torch.float32)
    through_FD = merged_FD + (rounded_FD.to(merged_FD.dtype) - merged_FD).detach()
    y = x @ through_FD.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


@torch.no_grad()
def round_merged(
    weight_FD: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, *, rounding: Rounding, workspace: Workspace
) -> Any:
    """Return weight and adapter in 4 bits."""
    merged_FD = workspace.take("merged_weight", tuple(weight_FD.shape), dtype=torch.float32, device=weight_FD.device)
    merged_FD.copy_(weight_FD).addmm_(lora_B.float(), lora_A.float(), alpha=rounding.scaling)
    return quantize_4bit(merged_FD, rounding.spec)


class _LoraRounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        weight_FD: torch.Tensor,
        bias: torch.Tensor | None,
        rounding: Rounding,
        workspace: Workspace,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, lora_A, lora_B, weight_FD)
        ctx.rounding, ctx.workspace = rounding, workspace
        rounded_FD = _rounded(x_TD.dtype, weight_FD, lora_A, lora_B, rounding, workspace)
        return torch.nn.functional.linear(x_TD, rounded_FD, None if bias is None else bias.to(x_TD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, lora_A, lora_B, weight_FD = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dtype, scaling = x_TD.dtype, ctx.rounding.scaling
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = product_in(lora_B.dtype, grad_y_TF.T, x_TD @ lora_A.to(dtype).T).mul_(scaling)
        if need_A:
            grad_A = product_in(lora_A.dtype, (grad_y_TF @ lora_B.to(dtype)).T, x_TD).mul_(scaling)
        if need_x:
            grad_x = grad_y_TF @ _rounded(dtype, weight_FD, lora_A, lora_B, ctx.rounding, ctx.workspace)
        return grad_x, grad_A, grad_B, None, None, None, None


def _rounded(
    dtype: torch.dtype,
    weight_FD: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    rounding: Rounding,
    workspace: Workspace,
) -> torch.Tensor:
    """Return the rounded weight in the compute dtype, in a buffer to use at once."""
    q = round_merged(weight_FD, lora_A, lora_B, rounding=rounding, workspace=workspace)
    out_FD = workspace.take("rounded_weight", tuple(weight_FD.shape), dtype=dtype, device=weight_FD.device)
    return dequantize_4bit(q, dtype=dtype, out=out_FD, workspace=workspace)
