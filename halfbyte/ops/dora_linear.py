"""A frozen linear layer whose rows are turned by a low-rank adapter and scaled to a trained length (DoRA).

    V = W + s B A        n = the lengths of V's rows, taken as constants in the backward        g = m / n

    d = dropout(x) / (1 - p)        v = V d        y = W (x - d) + g * v + b

    grad_m = sum over tokens of grad_y * v / n
    h = g * grad_y             grad_B = s h' (d A')             grad_A = s (h B)' d
    grad_x = grad_y W + dropout(((g - 1) * grad_y) W + s h B A) / (1 - p)

W (out, in), A (rank, in) and B (out, rank) are those of `lora_linear`, m (out,) is the fp32 magnitude. The dropout is
where PEFT puts it: what is dropped is missing from the turned and scaled part alone, and reaches y through W as it is.
Without dropout d = x and y = g * v + b, one large product. With it there are two, and more than half of what DoRA costs
is gone with `dropout=0`.

n needs V itself, which is as large as W: it is made a few rows at a time, in fp32, from the weight that was expanded
for the product anyway. Kept for the backward: x, the inner product d A', n, and the dropped positions. v is as large as
y and is computed again where the magnitude wants its gradient: one more product in the backward.

g starts at 1 and moves by thousandths, which 16 bits cannot tell from 1: a rounded v times g would be rounded back.
On a GPU v is therefore scaled in fp32, straight from the accumulators. A CPU's 16-bit products give no fp32; there
(g - 1) * W d + s g * B A d is small, computed first, and W x is added to it inside that product's own fp32 sums, which
also takes two large products.

Source: Liu et al., DoRA, arXiv 2402.09353, section 4.3 for the constant n; the dropout as in PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.dropout import drop_
from halfbyte.ops.expand_weight import FrozenWeight
from halfbyte.ops.lora_linear import Frozen, LoraOptions, add_product, product_in
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features, R rank

# Elements of V that exist at once: what a CPU's caches hold, and enough for a GPU to be busy with.
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 18, 1 << 23


def dora_linear(
    x: torch.Tensor,
    weight: FrozenWeight,
    bias: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    options: LoraOptions,
    workspace: Workspace,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a frozen weight whose rows an adapter turns and scales.

    Args:
        x: (..., in_features). Its dtype, or autocast's, is the compute dtype.
        weight: (out_features, in_features), in 4 bits or plain; gets no gradient.
        bias: (out_features,) or None.
        adapter: lora_A (rank, in_features), lora_B (out_features, rank) and the magnitude (out_features,), fp32.
        options: Scaling and dropout.
        workspace: Scratch buffers of the model.
        lengths: What `row_lengths` gives for this weight and adapter, where the caller has it.

    Returns:
        (..., out_features) in the compute dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return dora_linear(x, weight, bias, adapter, options=options, workspace=workspace, lengths=lengths)
    frozen = Frozen(weight=weight, options=options, workspace=workspace)
    x_TD = x.reshape(-1, x.shape[-1])
    y_TF = _DoraLinear.apply(x_TD, *adapter, bias, frozen, lengths)
    return y_TF.view(*x.shape[:-1], y_TF.shape[-1])


def dora_linear_reference(
    x: torch.Tensor,
    weight: FrozenWeight,
    bias: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    options: LoraOptions,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a frozen weight whose rows an adapter turns and scales, in plain torch.

    `keep` is the dropout, True where an element of x reaches the adapter.
    """
    if isinstance(weight, QuantizedTensor):
        weight = dequantize_4bit_reference(weight, dtype=x.dtype)
    lora_A, lora_B, magnitude = (t.to(x.dtype) for t in adapter)
    W = weight.to(x.dtype)
    V = W + options.scaling * lora_B @ lora_A
    gain = magnitude / V.detach().norm(dim=1)
    d = x if keep is None else x * keep / (1 - options.dropout)
    y = (x - d) @ W.T + gain * (d @ W.T + options.scaling * (d @ lora_A.T @ lora_B.T))
    return y if bias is None else y + bias.to(x.dtype)


@torch.no_grad()
def row_lengths(weight_FD: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Return the lengths of the rows of W + s B A, (out_features,) in the adapter's dtype.

    Args:
        weight_FD: (out_features, in_features), plain.
        lora_A: (rank, in_features).
        lora_B: (out_features, rank).
        scaling: Of their product.

    A row of nothing but zeros gets the smallest length there is, so that nothing is divided by zero.
    """
    lengths_F = torch.empty(weight_FD.shape[0], dtype=lora_A.dtype, device=weight_FD.device)
    step = max(1, (GPU_ELEMENTS if weight_FD.is_cuda else CPU_ELEMENTS) // weight_FD.shape[1])
    for start in range(0, weight_FD.shape[0], step):
        rows = slice(start, start + step)
        turned = torch.addmm(weight_FD[rows].to(lora_A.dtype), lora_B[rows], lora_A, alpha=scaling)
        torch.linalg.vector_norm(turned, dim=1, out=lengths_F[rows])
    return lengths_F.clamp_min_(torch.finfo(lengths_F.dtype).tiny)


def _forward(
    frozen: Frozen,
    x_TD: torch.Tensor,
    adapter: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    dropped: torch.Tensor | None,
    lengths_F: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, (1 - p) times the inner product of A, and n."""
    lora_A, lora_B, magnitude = adapter
    dtype, factor = x_TD.dtype, frozen.factor
    weight_FD = frozen.expand(dtype, x_TD.device)
    if lengths_F is None:
        lengths_F = row_lengths(weight_FD, lora_A, lora_B, scaling=frozen.options.scaling)
    gain_F = magnitude / lengths_F
    d_TD = frozen.drop(x_TD, dropped)
    u_TR = d_TD @ lora_A.to(dtype).T
    if dropped is None and (x_TD.is_cuda or x_TD.itemsize >= 4):
        y_TF = product_in(gain_F.dtype, x_TD, weight_FD.T)
        y_TF.addmm_(u_TR.to(y_TF.dtype), (lora_B * factor).T).mul_(gain_F)
        return (y_TF if bias is None else y_TF.add_(bias)).to(dtype), u_TR, lengths_F
    # 1 / (1 - p) of what was dropped is in the factor already.
    spread_F = (gain_F - 1) * (factor / frozen.options.scaling)
    y_TF = (d_TD @ weight_FD.T).mul_(spread_F.to(dtype))
    y_TF.addmm_(u_TR, (lora_B * (gain_F * factor)[:, None]).to(dtype).T)
    y_TF = add_product(y_TF, x_TD, weight_FD.T)
    return (y_TF if bias is None else y_TF.add_(bias.to(dtype))), u_TR, lengths_F


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        magnitude: torch.Tensor,
        bias: torch.Tensor | None,
        frozen: Frozen,
        lengths_F: torch.Tensor | None,
    ) -> torch.Tensor:
        dropped = frozen.draw(x_TD)
        y_TF, u_TR, lengths_F = _forward(frozen, x_TD, (lora_A, lora_B, magnitude), bias, dropped, lengths_F)
        ctx.save_for_backward(x_TD, lora_A, lora_B, magnitude, u_TR, lengths_F, dropped)
        ctx.frozen = frozen
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, lora_A, lora_B, magnitude, u_TR, lengths_F, dropped = ctx.saved_tensors
        need_x, need_A, need_B, need_magnitude, need_bias = ctx.needs_input_grad[:5]
        frozen, dtype, factor = ctx.frozen, x_TD.dtype, ctx.frozen.factor
        share = factor / frozen.options.scaling
        gain_F = magnitude / lengths_F
        grad_x = grad_A = grad_B = grad_magnitude = grad_bias = None
        weight_FD = frozen.expand(dtype, x_TD.device)
        if need_magnitude:
            v_TF = frozen.drop(x_TD, dropped) @ weight_FD.T
            v_TF.addmm_(u_TR, (lora_B * frozen.options.scaling).to(dtype).T).mul_(grad_y_TF)
            grad_magnitude = v_TF.sum(0, dtype=magnitude.dtype).mul_(share / lengths_F)
        h_TF = grad_y_TF * gain_F.to(dtype)
        grad_u_TR = h_TF @ lora_B.to(dtype)
        if need_B:
            grad_B = product_in(lora_B.dtype, h_TF.T, u_TR).mul_(factor)
        if need_A:
            grad_A = product_in(lora_A.dtype, grad_u_TR.T, frozen.drop(x_TD, dropped)).mul_(factor)
        if need_x:
            grad_x = grad_u_TR @ (lora_A * factor).to(dtype)
            if dropped is None:
                grad_x = add_product(grad_x, h_TF, weight_FD)
            else:
                torch.mul(grad_y_TF, ((gain_F - 1) * share).to(dtype), out=h_TF)
                grad_x = drop_(add_product(grad_x, h_TF, weight_FD), dropped)
                grad_x = add_product(grad_x, grad_y_TF, weight_FD)
        if need_bias:
            grad_bias = grad_y_TF.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_magnitude, grad_bias, None, None
