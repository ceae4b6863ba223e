"""The projections that share an input, for decoding: their weights where they are, their adapters stacked and cast.

    y_p = round(W_p x + bias_p + s B_p A_p f + residual)

The inner product s A f is made by the operation that makes x, see `decode_inner`; `multiply_group` does the rest, in
one launch for up to three 4-bit weights of one format. Weights are not joined, for that would be a second copy of the
model.

Adapters are cast once, when the group is made: it must not outlive a change of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.ops.matvec_4bit import OuterAdapters, fits, matvec_4bit_group, share_launch
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features of one projection, R ranks of the group

Projection = LoraLinear | Linear4bit | nn.Linear


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Projections of one launch."""

    weights: list[QuantizedTensor]
    plain_FD: torch.Tensor | None
    """Instead, the weight of one that is not in 4 bits."""
    widths: list[int]
    bias_F: torch.Tensor | None
    adapters: OuterAdapters | None


class DecodeGroup:
    """Projections of one input, as they are while decoding."""

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        """Prepare them.

        Args:
            projections: Of one input.
            dtype: Of the tokens; adapters are cast to it.
        """
        bases = [p.base if isinstance(p, LoraLinear) else p for p in projections]
        adapters_of = [p.acting if isinstance(p, LoraLinear) else None for p in projections]
        present = [acting for acting in adapters_of if acting is not None]
        first, width = bases[0], projections[0].in_features
        device = first.quantized.device if isinstance(first, Linear4bit) else first.weight.device
        self.A_RD = torch.cat([torch.empty(0, width, dtype=dtype, device=device), *(A.detach() for A, _ in present)])
        self.A_RD = self.A_RD.to(dtype)
        adapted = [p for p in projections if isinstance(p, LoraLinear) and p.acting is not None]
        scales = [scale for p in adapted for scale in [p.scaling] * p.rank]
        self.scale_R = torch.tensor(scales, dtype=torch.float32, device=device)
        adapters: OuterAdapters | None = None
        widths = [p.out_features for p in projections]
        if present:
            Bs = [None if acting is None else acting[1].detach() for acting in adapters_of]
            adapters = OuterAdapters.stack(Bs, widths, dtype=dtype, device=device)
        self.parts = [
            _Part(
                weights=[base.quantized for base in bases[first:last] if isinstance(base, Linear4bit)],
                plain_FD=None if isinstance(bases[first], Linear4bit) else bases[first].weight.detach().to(dtype),
                widths=widths[first:last],
                bias_F=_joined_bias(bases[first:last]),
                adapters=None if adapters is None else adapters.part(first, last, widths),
            )
            for first, last in _launches(bases)
        ]


def _launches(bases: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Return the first and last projection of each launch."""
    weights = [base.quantized for base in bases if isinstance(base, Linear4bit)]
    if len(weights) == len(bases) and share_launch(weights):
        return [(0, len(bases))]
    return [(i, i + 1) for i in range(len(bases))]


def _joined_bias(bases: Sequence[nn.Module]) -> torch.Tensor | None:
    """Return the biases one below the other, with zeros for one that has none."""
    biases: list[torch.Tensor | None] = [base.bias for base in bases]  # type: ignore[misc]
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    if len(bases) == 1:
        return present[0].detach()
    widths = [int(base.out_features) for base in bases]  # type: ignore[arg-type]
    filled = [present[0].new_zeros(width) if b is None else b for b, width in zip(biases, widths, strict=True)]
    return torch.cat([bias.detach() for bias in filled])


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
    overlap: bool = False,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """Multiply a few tokens by every projection of a group.

    Args:
        group: The projections.
        x_TD: Their input, contiguous.
        u_TR: The inner product of their adapters, fp32, already scaled.
        residual: (tokens, width), added before rounding; for a group of one projection.
        overlap: As `matvec_4bit_group`.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        The output of each, (tokens, width) in the dtype of x.
    """
    products = []
    for part in group.parts:
        if part.plain_FD is None:
            products += matvec_4bit_group(
                x_TD,
                part.weights,
                part.bias_F,
                adapters=part.adapters,
                u_TR=None if part.adapters is None else u_TR,
                add=residual,
                overlap=overlap,
                backend=backend,
            )
        else:
            products.append(_plain_product(x_TD, u_TR, part, residual))
    return products


def _plain_product(x_TD: torch.Tensor, u_TR: torch.Tensor, part: _Part, residual: torch.Tensor | None) -> torch.Tensor:
    assert part.plain_FD is not None
    add = residual
    if part.adapters is not None:
        (outer,) = part.adapters.multiply(u_TR, part.widths)
        add = outer if add is None else outer + add
    if add is None:
        bias = None if part.bias_F is None else part.bias_F.to(x_TD.dtype)
        return nn.functional.linear(x_TD, part.plain_FD, bias)
    add = add if part.bias_F is None else add + part.bias_F
    return torch.addmm(add.to(x_TD.dtype), x_TD, part.plain_FD.T)
