"""A linear layer with a low-rank adapter beside it; the layer itself is frozen.

    y = base(x) + scaling * B A dropout(x)        scaling = alpha / rank, or alpha / sqrt(rank) with rsLoRA

The adapter's master values are fp32 and stay so: `.half()`, `.bfloat16()` and `.to(dtype)` of the model leave them
alone, because an update of a learning rate of 2e-4 vanishes in a 16-bit weight.

Sources: Hu et al., LoRA, arXiv 2106.09685; Kalajdzievski, rsLoRA, arXiv 2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from halfbyte.nn.expanded import ExpandedWeight
from halfbyte.nn.linear import Linear4bit
from halfbyte.ops.lora_linear import LoraOptions, lora_linear
from halfbyte.ops.lora_rounded import Rounding, lora_rounded
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantSpec


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
        self.expanded: ExpandedWeight | None = None
        self.rounding: QuantSpec | None = None
        """Where set, base and adapter are multiplied as they are once both are put into 4 bits together."""
        self._options = LoraOptions(scaling=self.scaling)
        self._training_options = LoraOptions(scaling=self.scaling, dropout=dropout)
        device = base.compute_device if isinstance(base, Linear4bit) else base.weight.device
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

    def set_dropout(self, dropout: float) -> None:
        """Drop another share of the adapter's input in training from now on."""
        self.dropout = dropout
        self._training_options = LoraOptions(scaling=self.scaling, dropout=dropout)

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
            values = torch.empty(self.lora_A.shape, dtype=torch.float32, device="cpu")
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
        if self.expanded is not None and not (self.training and self.dropout) and self.expanded.is_usable(x):
            return self.expanded.multiply(x, with_adapter=self.adapter_enabled)
        if self.rounding is not None:
            return self._rounded(x, self.rounding)
        if not self.adapter_enabled:
            return self.base(x)
        weight = self.base.home if isinstance(self.base, Linear4bit) else self.base.weight
        options = self._training_options if self.training else self._options
        return lora_linear(
            x, weight, self.base.bias, self.lora_A, self.lora_B, options=options, workspace=self.workspace
        )

    def _rounded(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        rounding = Rounding(scaling=self.scaling if self.adapter_enabled else 0.0, spec=spec)
        weight = self.base.weight
        return lora_rounded(
            x, weight, self.base.bias, self.lora_A, self.lora_B, rounding=rounding, workspace=self.workspace
        )

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:.4g}, dropout={self.dropout}"

    @torch.no_grad()
    def expand(self, dtype: torch.dtype) -> ExpandedWeight:
        """Return base and adapter expanded to `dtype`; as `expanded`, forwards without grad use it."""
        if isinstance(self.base, Linear4bit):
            base = self.base.expand(dtype)
        else:
            base = ExpandedWeight.of_base(self.base.weight.detach().to(dtype), self.base.bias)
        return ExpandedWeight.of_adapter(base, self.lora_A, self.lora_B, scaling=self.scaling)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoraLinear:
        masters = {name: getattr(self, name).data for name in ("lora_A", "lora_B")}
        super()._apply(fn, recurse)
        for name, before in masters.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self
