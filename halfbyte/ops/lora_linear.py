"""A frozen linear layer with a low-rank adapter beside it.

    d = dropout(x) / (1 - p)        u = d A'        y = x W' + b + s u B'

    grad_B = s grad_y' u                            grad_u = s grad_y B
    grad_A = grad_u' d                              grad_x = grad_y W + dropout(grad_u A) / (1 - p)

W (out, in) is frozen, in 4 bits or plain. A (rank, in) and B (out, rank) are fp32 master values, cast to the compute
dtype for the products, and get fp32 gradients.

Kept for the backward: x, u (tokens x rank, so grad_B needs no second pass over x), the dropped positions, and the
masters by reference. Never W in 16 bits, see `expand_weight`, and never d: it is written again into a reused buffer.

The adapter's part is small beside the base's: after the first steps less than half of what 16 bits can tell apart.
Added to a base output that is already rounded it would be rounded away; one rounding of the whole keeps it on average.
On a CPU it is computed first, and the large product is added to it inside that product's own fp32 sums. A GPU's
products round before they add; there u and s B lie beside x and W, so that one product sums both. The gradient of the
input is treated alike; where dropout parts its two shares on a GPU, they meet in fp32.

s / (1 - p) is one factor, applied to the small matrices.

A few tokens on a GPU that want no gradient, as in decoding, are multiplied without expanding W, see `matvec_4bit`,
which takes the adapter's part in fp32.

Price: W is expanded twice a step, and there is no second derivative.

Source: Hu et al., LoRA, arXiv 2106.09685, with the dropout where PEFT puts it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.dropout import apply_dropout, draw_dropout, drop_
from halfbyte.ops.expand_weight import FrozenWeight, expand_weight
from halfbyte.ops.matvec_4bit import fits, matvec_4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features, R rank, E = D and spare columns

# Spare columns come in this many, so that rows of the buffers stay aligned.
SPARE_MULTIPLE = 16


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
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x.to(dtype), weight, bias, lora_A, lora_B, options=options, workspace=workspace)
    frozen = Frozen(weight=weight, options=options, workspace=workspace)
    x_TD = x.reshape(-1, x.shape[-1])
    trained = (t for t in (x, lora_A, lora_B, bias) if t is not None and t.requires_grad)
    if torch.is_grad_enabled() and any(True for _ in trained):
        y_TF = _LoraLinear.apply(x_TD, lora_A, lora_B, bias, frozen)
    elif isinstance(weight, QuantizedTensor) and weight.device == x_TD.device and x_TD.is_cuda and fits(x_TD, weight):
        u_TR = frozen.drop(x_TD, frozen.draw(x_TD)) @ lora_A.to(x_TD.dtype).T
        adapter_TF = (u_TR.to(lora_B.dtype) * frozen.factor) @ lora_B.T
        y_TF = matvec_4bit(x_TD, weight, bias, add=adapter_TF)
    else:
        y_TF, _ = frozen.products(x_TD, lora_A, lora_B, bias, dropped=frozen.draw(x_TD))
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """What a call has beside the tensors that may get a gradient."""

    weight: FrozenWeight
    options: LoraOptions
    workspace: Workspace

    @property
    def factor(self) -> float:
        """s / (1 - p)."""
        return self.options.scaling / (1 - self.options.dropout)

    def expand(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return expand_weight(self.weight, dtype=dtype, workspace=self.workspace, device=device)

    def draw(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        return draw_dropout(x_TD, probability=self.options.dropout) if self.options.dropout else None

    def drop(self, x_TD: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
        """Return the adapter's input, (1 - p) d, in a buffer to use at once."""
        if dropped is None:
            return x_TD
        out_TD = self.workspace.take("dropped_input", tuple(x_TD.shape), dtype=x_TD.dtype, device=x_TD.device)
        return apply_dropout(x_TD, dropped, out=out_TD)

    def products(
        self,
        x_TD: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        dropped: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y and (1 - p) u."""
        dtype = x_TD.dtype
        u_TR = self.drop(x_TD, dropped) @ lora_A.to(dtype).T
        if rides(x_TD):
            return self.riding_product(x_TD, u_TR, lora_B, bias), u_TR
        y_TF = u_TR @ (lora_B * self.factor).to(dtype).T
        y_TF.addmm_(x_TD, self.expand(dtype, x_TD.device).T)
        return y_TF if bias is None else y_TF.add_(bias.to(dtype)), u_TR

    def riding_product(
        self, x_TD: torch.Tensor, u_TR: torch.Tensor, lora_B: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return [x, u] [W, s B]' + b, summed in one product."""
        dtype, (num_tokens, width), rank = x_TD.dtype, x_TD.shape, u_TR.shape[1]
        spare = -(-rank // SPARE_MULTIPLE) * SPARE_MULTIPLE
        shape = (num_tokens, width + spare)
        x_TE = self.workspace.take("lora_input", shape, dtype=dtype, device=x_TD.device)
        weight_FE = expand_weight(
            self.weight, dtype=dtype, workspace=self.workspace, device=x_TD.device, spare_columns=spare
        )
        for buffer, left, right in ((x_TE, x_TD, u_TR), (weight_FE, None, lora_B * self.factor)):
            if left is not None:
                buffer[:, :width] = left
            buffer[:, width : width + rank] = right
            buffer[:, width + rank :] = 0
        return torch.nn.functional.linear(x_TE, weight_FE, None if bias is None else bias.to(dtype))

    def input_gradient(
        self, grad_y_TF: torch.Tensor, grad_u_TR: torch.Tensor, lora_A: torch.Tensor, dropped: torch.Tensor | None
    ) -> torch.Tensor:
        """Return grad_y W + dropout(grad_u A) s / (1 - p), rounded once."""
        dtype = grad_y_TF.dtype
        small_TD = grad_u_TR @ (lora_A * self.factor).to(dtype)
        if dropped is not None:
            drop_(small_TD, dropped)
        return add_product(small_TD, grad_y_TF, self.expand(dtype, grad_y_TF.device))


def rides(x: torch.Tensor) -> bool:
    """Say whether products of `x` round before they add to a matrix that is there."""
    return x.is_cuda and x.itemsize == 2


def add_product(small: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return small + left @ right, rounded once; `small` may be written to."""
    if rides(left):
        return torch.mm(left, right, out_dtype=torch.float32).add_(small).to(left.dtype)
    return small.addmm_(left, right)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        bias: torch.Tensor | None,
        frozen: Frozen,
    ) -> torch.Tensor:
        dropped = frozen.draw(x_TD)
        y_TF, u_TR = frozen.products(x_TD, lora_A, lora_B, bias, dropped=dropped)
        ctx.save_for_backward(x_TD, lora_A, lora_B, u_TR, dropped)
        ctx.frozen = frozen
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, lora_A, lora_B, u_TR, dropped = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        frozen, dtype = ctx.frozen, x_TD.dtype
        grad_x = grad_A = grad_B = grad_bias = None
        if need_B:
            grad_B = product_in(lora_B.dtype, grad_y_TF.T, u_TR).mul_(frozen.factor)
        if need_A or need_x:
            grad_u_TR = grad_y_TF @ lora_B.to(dtype)
        if need_A:
            grad_A = product_in(lora_A.dtype, grad_u_TR.T, frozen.drop(x_TD, dropped)).mul_(frozen.factor)
        if need_x:
            grad_x = frozen.input_gradient(grad_y_TF, grad_u_TR, lora_A, dropped)
        if need_bias:
            grad_bias = grad_y_TF.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_bias, None


def product_in(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right in `dtype`: from the accumulators where the device allows, else rounded on the way."""
    if left.is_cuda and dtype == torch.float32 != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)
