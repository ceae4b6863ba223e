"""A frozen linear layer with a low-rank adapter beside it.

    d = dropout(x) / (1 - p)        u = d A'        y = x W' + b + s u B'

    grad_B = s grad_y' u                            grad_u = s grad_y B
    grad_A = grad_u' d                              grad_x = grad_y W + dropout(grad_u A) / (1 - p)

W (out, in) is frozen, in 4 bits or plain. A (rank, in) and B (out, rank) are fp32 master values, cast to the compute
dtype for the products, and get fp32 gradients.

Kept for the backward: x, u (tokens x rank, so grad_B needs no second pass over x), the dropped positions, and the
masters by reference. Never W in 16 bits, see `expand_weight`, and never d: it is written again into a reused buffer.

The adapter's part is accumulated in place into the output of the large product, and into the gradient of the input,
so no temporary of activation size is made beyond the results themselves. s and 1 / (1 - p) are one factor, given to
the matrix products, which apply it for free.

Price: W is expanded twice a step, and there is no second derivative.

Source: Hu et al., LoRA, arXiv 2106.09685, with the dropout where PEFT puts it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.dropout import add_dropped_product_, apply_dropout, draw_dropout
from halfbyte.ops.expand_weight import FrozenWeight, expand_weight, resolve_compute_dtype
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features, R rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """How an adapter acts."""

    scaling: float
    """Factor of the adapter's output."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in this call; 0 outside training."""


def lora_linear(
    x: torch.Tensor,
    weight: FrozenWeight,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    options: LoraOptions,
    workspace: Workspace,
) -> torch.Tensor:
    """Multiply by a frozen weight and add what the adapter says.

    Args:
        x: (..., in_features). Its dtype, or autocast's, is the compute dtype.
        weight: (out_features, in_features), in 4 bits or plain; gets no gradient.
        bias: (out_features,) or None.
        lora_A: (rank, in_features), fp32.
        lora_B: (out_features, rank), fp32.
        options: Scaling and dropout.
        workspace: Scratch buffers of the model.

    Returns:
        (..., out_features) in the compute dtype.
    """
    dtype = resolve_compute_dtype(x)
    x_TD = x.to(dtype).reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y_TF = _LoraLinear.apply(x_TD, lora_A, lora_B, bias, weight, options, workspace)
    return y_TF.view(*x.shape[:-1], y_TF.shape[-1])


def lora_linear_reference(
    x: torch.Tensor,
    weight: FrozenWeight,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    options: LoraOptions,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a frozen weight and add what the adapter says, in plain torch.

    `keep` is the dropout, True where an element of x reaches the adapter.
    """
    if isinstance(weight, QuantizedTensor):
        weight = dequantize_4bit_reference(weight, dtype=x.dtype)
    dropped = x if keep is None else x * keep / (1 - options.dropout)
    y = x @ weight.to(x.dtype).T + options.scaling * (dropped @ lora_A.to(x.dtype).T @ lora_B.to(x.dtype).T)
    return y if bias is None else y + bias.to(x.dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        bias: torch.Tensor | None,
        weight: FrozenWeight,
        options: LoraOptions,
        workspace: Workspace,
    ) -> torch.Tensor:
        dtype = x_TD.dtype
        dropped = draw_dropout(x_TD, probability=options.dropout) if options.dropout else None
        weight_FD = expand_weight(weight, dtype=dtype, workspace=workspace)
        y_TF = torch.nn.functional.linear(x_TD, weight_FD, None if bias is None else bias.to(dtype))
        u_TR = _dropped_input(x_TD, dropped, workspace) @ lora_A.to(dtype).T
        y_TF.addmm_(u_TR, lora_B.to(dtype).T, alpha=options.scaling / (1 - options.dropout))
        ctx.save_for_backward(x_TD, lora_A, lora_B, u_TR, dropped)
        ctx.weight, ctx.options, ctx.workspace = weight, options, workspace
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TF: torch.Tensor) -> tuple[Any, ...]:
        x_TD, lora_A, lora_B, u_TR, dropped = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        dtype, factor = x_TD.dtype, ctx.options.scaling / (1 - ctx.options.dropout)
        grad_x = grad_A = grad_B = grad_bias = None
        if need_B:
            grad_B = (grad_y_TF.T @ u_TR).float().mul_(factor)
        if need_A or need_x:
            grad_u_TR = grad_y_TF @ lora_B.to(dtype)
        if need_A:
            grad_A = (grad_u_TR.T @ _dropped_input(x_TD, dropped, ctx.workspace)).float().mul_(factor)
        if need_x:
            grad_x = grad_y_TF @ expand_weight(ctx.weight, dtype=dtype, workspace=ctx.workspace)
            if dropped is None:
                grad_x.addmm_(grad_u_TR, lora_A.to(dtype), alpha=factor)
            else:
                add_dropped_product_(grad_x, grad_u_TR, lora_A.to(dtype), dropped=dropped, alpha=factor)
        if need_bias:
            grad_bias = grad_y_TF.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_bias, None, None, None


def _dropped_input(x_TD: torch.Tensor, dropped: torch.Tensor | None, workspace: Workspace) -> torch.Tensor:
    if dropped is None:
        return x_TD
    out_TD = workspace.take("dropped_input", tuple(x_TD.shape), dtype=x_TD.dtype, device=x_TD.device)
    return apply_dropout(x_TD, dropped, out=out_TD)
