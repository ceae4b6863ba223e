"""The projections that share an input, for decoding: their weights where they are, their adapters stacked and cast.

    y_p = round(W_p x + bias_p + s B_p A_p f + residual)

The inner product s A f is made by the operation that makes x, see `decode_inner`; `multiply_group` does the rest: one
small product for all adapters of the group, and one 4-bit product a projection. Weights are not joined, for that would
be a second copy of the model; what multiplies several at once belongs into `multiply_group`.

Adapters are cast once, when the group is made: it must not outlive a change of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.ops.decode_outer import OuterAdapters, decode_outer
from halfbyte.ops.matvec_4bit import fits, matvec_4bit
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features of one projection, R ranks of the group

Projection = LoraLinear | Linear4bit | nn.Linear


class DecodeGroup:
    """Projections of one input, as they are while decoding."""

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        """Prepare them.

        Args:
            projections: Of one input.
            dtype: Of the tokens; adapters are cast to it.
        """
        bases = [p.base if isinstance(p, LoraLinear) else p for p in projections]
        self.weights: list[QuantizedTensor | torch.Tensor] = [
            base.quantized if isinstance(base, Linear4bit) else base.weight.detach() for base in bases
        ]
        self.biases = [None if base.bias is None else base.bias.detach() for base in bases]
        adapted = [p if isinstance(p, LoraLinear) and p.adapter_enabled else None for p in projections]
        present = [p for p in adapted if p is not None]
        device, width = self.weights[0].device, projections[0].in_features
        self.A_RD = torch.cat(
            [torch.empty(0, width, dtype=dtype, device=device), *(p.lora_A.detach() for p in present)]
        )
        self.A_RD = self.A_RD.to(dtype)
        scales = [scale for p in present for scale in [p.scaling] * p.rank]
        self.scale_R = torch.tensor(scales, dtype=torch.float32, device=device)
        self.adapters: OuterAdapters | None = None
        if present:
            Bs = [None if p is None else p.lora_B.detach() for p in adapted]
            widths = [p.out_features for p in projections]
            self.adapters = OuterAdapters.stack(Bs, widths, dtype=dtype, device=device)


def kernel_fits(projection: Projection, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether a projection is not in 4 bits, or its weight one that the kernel takes for so many tokens."""
    base = projection.base if isinstance(projection, LoraLinear) else projection
    if not isinstance(base, Linear4bit):
        return True
    x_TD = torch.empty(num_tokens, base.in_features, dtype=dtype, device=device)
    return fits(x_TD, base.quantized)


def multiply_group(
    group: DecodeGroup,
    x_TD: torch.Tensor,
    u_TR: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """Multiply a few tokens by every projection of a group.

    Args:
        group: The projections.
        x_TD: Their input, contiguous.
        u_TR: The inner product of their adapters, fp32, already scaled.
        residual: (tokens, width), added before rounding; for a group of one projection.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        The output of each, (tokens, width) in the dtype of x.
    """
    adds: Sequence[torch.Tensor | None] = [residual] * len(group.weights)
    if group.adapters is not None:
        adds = decode_outer(u_TR, group.adapters, residual=residual, backend=backend)
    products = []
    for weight, bias, add in zip(group.weights, group.biases, adds, strict=True):
        if isinstance(weight, QuantizedTensor):
            products.append(matvec_4bit(x_TD, weight, bias, add=add, backend=backend))
        else:
            products.append(_plain_product(x_TD, weight, bias, add))
    return products


def _plain_product(
    x_TD: torch.Tensor, weight_FD: torch.Tensor, bias: torch.Tensor | None, add: torch.Tensor | None
) -> torch.Tensor:
    weight_FD = weight_FD.to(x_TD.dtype)
    if add is None:
        return nn.functional.linear(x_TD, weight_FD, None if bias is None else bias.to(x_TD.dtype))
    add = add if bias is None else add + bias
    return torch.addmm(add.to(x_TD.dtype), x_TD, weight_FD.T)
