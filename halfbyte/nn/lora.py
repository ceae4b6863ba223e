"""A linear layer with a low-rank adapter beside it; the layer itself is frozen.

    y = base(x) + scaling * B A dropout(x)        scaling = alpha / rank, or alpha / sqrt(rank) with rsLoRA

The adapter's master values are fp32 and stay so: `.half()`, `.bfloat16()` and `.to(dtype)` of the model leave them
alone, because an update of a learning rate of 2e-4 vanishes in a 16-bit weight.

Sources: Hu et al., LoRA, arXiv 2106.09685; Kalajdzievski, rsLoRA, arXiv 2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.ops.lora_linear import LoraOptions, lora_linear
from halfbyte.ops.workspace import Workspace

# T tokens, D in_features, F out_features, R rank, E = F + R


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpandedLora:
    """What one product needs while the base weight is kept expanded, see `halfbyte.nn.inference`."""

    weights_ED: torch.Tensor
    """The base weight with lora_A below it, so that one product gives the base's output and the adapter's input."""
    bias_E: torch.Tensor | None
    """The base's bias, then zeros."""
    scaled_B_RF: torch.Tensor
    """lora_B transposed, times the scaling."""


class LoraLinear(nn.Module):
    """A frozen `Linear4bit` or `nn.Linear` with an adapter."""

    def __init__(
        self,
        base: Linear4bit | nn.Linear,
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.adapter_enabled = True
        self.workspace = workspace or (base.workspace if isinstance(base, Linear4bit) else Workspace())
        self._expanded: ExpandedLora | None = None
        self._options = LoraOptions(scaling=self.scaling)
        self._training_options = LoraOptions(scaling=self.scaling, dropout=dropout)
        device = base.packed.device if isinstance(base, Linear4bit) else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, dtype=torch.float32, device=device))
        self.reset_adapter()
        self.train(base.training)

    @classmethod
    def from_base(
        cls,
        base: Linear4bit | nn.Linear,
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
        workspace: Workspace | None = None,
    ) -> LoraLinear:
        """Put an adapter that changes nothing yet beside `base`; `unwrap` is the inverse."""
        return cls(base, rank=rank, alpha=alpha, rslora=rslora, dropout=dropout, workspace=workspace)

    def unwrap(self) -> Linear4bit | nn.Linear:
        """Return the frozen layer alone."""
        return self.base

    def reset_adapter(self, seed: int | None = None) -> None:
        """Draw lora_A anew, uniform within 1 / sqrt(in_features) as PEFT does, and set lora_B to zero.

        Args:
            seed: Decides the values alone; without it they come from torch's generator.
        """
        with torch.no_grad():
            self.lora_B.zero_()
            if self.lora_A.is_meta:
                return
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            values = torch.empty(self.lora_A.shape)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            self.lora_A.copy_(values)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """Return what the adapter adds to the weight, (out_features, in_features) in fp32."""
        return (self.lora_B.float() @ self.lora_A.float()).mul_(self.scaling)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, without the adapter."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._expanded is not None and self._is_expanded_usable(x):
            return self._forward_expanded(x, self._expanded)
        if not self.adapter_enabled:
            return self.base(x)
        weight = self.base.quantized if isinstance(self.base, Linear4bit) else self.base.weight
        options = self._training_options if self.training else self._options
        return lora_linear(
            x, weight, self.base.bias, self.lora_A, self.lora_B, options=options, workspace=self.workspace
        )

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:.4g}, dropout={self.dropout}"

    @property
    def is_expanded(self) -> bool:
        return self._expanded is not None

    @torch.no_grad()
    def expand(self, dtype: torch.dtype) -> None:
        """Keep the base's weight in `dtype` for inference until `release`."""
        weights_ED = torch.cat([self.base.weight.to(dtype), self.lora_A.to(dtype)])
        bias = self.base.bias
        self._expanded = ExpandedLora(
            weights_ED=weights_ED,
            bias_E=None if bias is None else nn.functional.pad(bias.to(dtype), (0, self.rank)),
            scaled_B_RF=(self.lora_B.T * self.scaling).to(dtype).contiguous(),
        )

    def release(self) -> None:
        """Forget what `expand` kept."""
        self._expanded = None

    def _is_expanded_usable(self, x: torch.Tensor) -> bool:
        if torch.is_grad_enabled() or (self.training and self.dropout):
            return False
        return self._expanded is not None and self._expanded.weights_ED.dtype == x.dtype

    def _forward_expanded(self, x: torch.Tensor, expanded: ExpandedLora) -> torch.Tensor:
        num_out = self.base.out_features
        if not self.adapter_enabled:
            return nn.functional.linear(x, expanded.weights_ED[:num_out], self.base.bias)
        both = nn.functional.linear(x.reshape(-1, x.shape[-1]), expanded.weights_ED, expanded.bias_E)
        y_TF = torch.addmm(both[:, :num_out], both[:, num_out:], expanded.scaled_B_RF)
        return y_TF.view(*x.shape[:-1], num_out)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoraLinear:
        masters = {name: getattr(self, name).data for name in ("lora_A", "lora_B")}
        super()._apply(fn, recurse)
        for name, before in masters.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self
