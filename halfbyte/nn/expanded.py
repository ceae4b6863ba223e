"""A frozen weight kept expanded for inference, with its adapter beside it.

    [y0, u] = x [W; A]' + [b, 0]        y = y0 + u (s B')

lora_A lies below the weight, so that one product gives the base's output and the adapter's input, and a second small
one adds the adapter's output. The adapter stays an adapter: W is not touched.

While decoding, a layer multiplies one token, and what it costs is reading the weight and calling torch. The products
are therefore in the dtype of the expanded weight whatever that of the activations is: for one token on a CPU, fp32
reads twice the bytes of bf16 and is no slower, because torch's 16-bit products of one row run at half the memory's
speed, and the small product of the adapter is five times as fast (13 against 59 us on a Xeon with AMX). Many tokens
at once are better off in 16 bits, expansion included.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

# T tokens, D in_features, F out_features, R rank, E = F + R

FEW_TOKENS = 256
"""Up to so many tokens the expanded weight is used although its dtype is not that of the activations."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpandedWeight:
    """What the products of one layer need."""

    weight_FD: torch.Tensor
    bias_F: torch.Tensor | None
    both_ED: torch.Tensor | None = None
    """The weight with lora_A below it; `weight_FD` is its upper part. None without an adapter."""
    bias_E: torch.Tensor | None = None
    scaled_B_RF: torch.Tensor | None = None
    """lora_B transposed, times the scaling."""
    gain_F: torch.Tensor | None = None
    """What DoRA multiplies the sum with; the bias is then added after it."""

    @classmethod
    def of_base(cls, weight_FD: torch.Tensor, bias: torch.Tensor | None) -> ExpandedWeight:
        """Prepare a layer without an adapter, in the dtype of its weight."""
        return cls(weight_FD=weight_FD, bias_F=None if bias is None else bias.to(weight_FD.dtype))

    @classmethod
    def of_adapter(
        cls,
        base: ExpandedWeight,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        *,
        scaling: float,
        gain_F: torch.Tensor | None = None,
    ) -> ExpandedWeight:
        """Put an adapter beside a layer; its weight is copied."""
        dtype, num_out = base.weight_FD.dtype, base.weight_FD.shape[0]
        both_ED = torch.cat([base.weight_FD, lora_A.to(dtype)])
        bias_F = base.bias_F if gain_F is None else None
        return cls(
            weight_FD=both_ED[:num_out],
            bias_F=base.bias_F,
            both_ED=both_ED,
            bias_E=None if bias_F is None else functional.pad(bias_F, (0, lora_A.shape[0])),
            scaled_B_RF=(lora_B.T * scaling).to(dtype).contiguous(),
            gain_F=None if gain_F is None else gain_F.to(dtype),
        )

    def is_usable(self, x: torch.Tensor) -> bool:
        """Say whether this is the better way to multiply `x`: without a gradient, and few tokens or the same dtype."""
        if torch.is_grad_enabled():
            return False
        return x.dtype == self.weight_FD.dtype or x.numel() <= FEW_TOKENS * x.shape[-1]

    def multiply(self, x: torch.Tensor, *, with_adapter: bool) -> torch.Tensor:
        """Return the layer's output in the dtype of `x`."""
        weight_FD, dtype = self.weight_FD, x.dtype
        num_out, in_features = weight_FD.shape
        x_TD = x.reshape(-1, in_features)
        # A cast that does nothing costs a third of a small product.
        if dtype != weight_FD.dtype:
            x_TD = x_TD.to(weight_FD.dtype)
        if with_adapter and self.both_ED is not None and self.scaled_B_RF is not None:
            both_TE = functional.linear(x_TD, self.both_ED, self.bias_E)
            y_TF, u_TR = both_TE.split_with_sizes((num_out, both_TE.shape[1] - num_out), 1)
            y_TF = torch.addmm(y_TF, u_TR, self.scaled_B_RF)
            if self.gain_F is not None:
                y_TF *= self.gain_F
                y_TF = y_TF if self.bias_F is None else y_TF.add_(self.bias_F)
        else:
            y_TF = functional.linear(x_TD, weight_FD, self.bias_F)
        if dtype != weight_FD.dtype:
            y_TF = y_TF.to(dtype)
        return y_TF.view(*x.shape[:-1], num_out)
