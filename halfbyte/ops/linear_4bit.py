"""A linear layer whose frozen weight is kept in 4 bits.

    y = x W' + b        grad_x = grad_y W

W is expanded into the workspace just before either product and never saved: what autograd keeps for the backward is
the 4-bit record that the model owns anyway. The weight gets no gradient. A bias that asks for one gets it.

A few tokens on a GPU that want no gradient, as in decoding, are multiplied without expanding, see `matvec_4bit`.

Why a hand-written autograd.Function: torch's own would save the expanded weight for the backward, 16 bits a weight
for as long as the graph lives, and the buffer could not be shared between layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.expand_weight import expand_weight
from halfbyte.ops.matvec_4bit import fits, matvec_4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features


def linear_4bit(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None, *, workspace: Workspace
) -> torch.Tensor:
    """Multiply by a frozen 4-bit weight.

    Args:
        x: (..., in_features). Its dtype, or autocast's, is the compute dtype.
        q: (out_features, in_features).
        bias: (out_features,).
        workspace: Scratch buffers of the model.

    Returns:
        (..., out_features) in the compute dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return linear_4bit(x.to(dtype), q, bias, workspace=workspace)
    x_TD = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y_TF = _Linear4bit.apply(x_TD, bias, q, workspace)
    elif x_TD.is_cuda and q.device == x_TD.device and fits(x_TD, q):
        y_TF = matvec_4bit(x_TD, q, bias)
    else:
        y_TF = _product(x_TD, bias, q, workspace)
    return y_TF.view(*x.shape[:-1], y_TF.shape[-1])


def linear_4bit_reference(x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by a frozen 4-bit weight, in plain torch."""
    weight_FD = dequantize_4bit_reference(q, dtype=x.dtype)
    return torch.nn.functional.linear(x, weight_FD, None if bias is None else bias.to(x.dtype))


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, bias: torch.Tensor | None, q: QuantizedTensor, workspace: Workspace
    ) -> torch.Tensor:
        ctx.q, ctx.workspace = q, workspace
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x_TD, bias, q, workspace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TF: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_x_TD = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight_FD = expand_weight(ctx.q, dtype=grad_y_TF.dtype, workspace=ctx.workspace, device=grad_y_TF.device)
            grad_x_TD = grad_y_TF @ weight_FD
        if ctx.needs_input_grad[1]:
            grad_bias = grad_y_TF.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x_TD, grad_bias, None, None


def _product(x_TD: torch.Tensor, bias: torch.Tensor | None, q: QuantizedTensor, workspace: Workspace) -> torch.Tensor:
    weight_FD = expand_weight(q, dtype=x_TD.dtype, workspace=workspace, device=x_TD.device)
    return torch.nn.functional.linear(x_TD, weight_FD, None if bias is None else bias.to(x_TD.dtype))
