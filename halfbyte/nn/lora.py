"""A linear layer with a low-rank adapter beside it; the layer itself is frozen.

    y = base(x) + scaling * B A dropout(x)        scaling = alpha / rank, or alpha / sqrt(rank) with rsLoRA

With DoRA the rows of W + scaling * B A are scaled to a trained length besides, see `dora_linear`.

The adapter's master values are fp32 and stay so: `.half()`, `.bfloat16()` and `.to(dtype)` of the model leave them
alone, because an update of a learning rate of 2e-4 vanishes in a 16-bit weight.

A base may hold its weight less a product of that size, scaling * taken_B taken_A, which was taken out before it was
quantised and which the adapter has begun from (see `halfbyte.nn.split`). The base as such is then both together, and
that is what the layer is while its adapter is off.

Sources: Hu et al., LoRA, arXiv 2106.09685; Kalajdzievski, rsLoRA, arXiv 2312.03732; Liu et al., DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from halfbyte.nn.expanded import ExpandedWeight
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.split import Factors
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.dora_linear import dora_linear, row_lengths
from halfbyte.ops.lora_linear import LoraOptions, lora_linear
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantizedTensor

MASTERS = ("lora_A", "lora_B", "lora_magnitude_vector", "taken_A", "taken_B")
"""What stays in fp32."""


class LoraLinear(nn.Module):
    """A frozen `Linear4bit` or `nn.Linear` with an adapter."""

    lora_magnitude_vector: nn.Parameter | None
    taken_A: torch.Tensor | None
    taken_B: torch.Tensor | None

    def __init__(
        self,
        base: Linear4bit | nn.Linear,
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dora: bool = False,
        dropout: float = 0.0,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scaling = scaling_of(alpha, rank, rslora=rslora)
        self.adapter_enabled = True
        self.workspace = workspace or (base.workspace if isinstance(base, Linear4bit) else Workspace())
        self.expanded: ExpandedWeight | None = None
        self._options = LoraOptions(scaling=self.scaling)
        self._training_options = LoraOptions(scaling=self.scaling, dropout=dropout)
        self._lengths: tuple[tuple[int, ...], torch.Tensor] | None = None
        device = base.compute_device if isinstance(base, Linear4bit) else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, dtype=torch.float32, device=device))
        magnitude = torch.empty(base.out_features, dtype=torch.float32, device=device) if dora else None
        self.lora_magnitude_vector = None if magnitude is None else nn.Parameter(magnitude)
        self.register_buffer("taken_A", None, persistent=False)
        self.register_buffer("taken_B", None, persistent=False)
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
        dora: bool = False,
        dropout: float = 0.0,
        workspace: Workspace | None = None,
    ) -> LoraLinear:
        """Put an adapter that changes nothing yet beside `base`; `unwrap` is the inverse."""
        return cls(base, rank=rank, alpha=alpha, rslora=rslora, dora=dora, dropout=dropout, workspace=workspace)

    def set_dropout(self, dropout: float) -> None:
        """Drop another share of the adapter's input in training from now on."""
        self.dropout = dropout
        self._training_options = LoraOptions(scaling=self.scaling, dropout=dropout)

    def unwrap(self) -> Linear4bit | nn.Linear:
        """Return the frozen layer alone."""
        return self.base

    @torch.no_grad()
    def reset_adapter(self, seed: int | None = None) -> None:
        """Draw lora_A anew, uniform within 1 / sqrt(in_features) as PEFT does, and set lora_B to zero.

        A magnitude becomes the lengths of the base's rows.

        Args:
            seed: Decides the values alone; without it they come from torch's generator.
        """
        self.lora_B.zero_()
        if self.lora_A.is_meta:
            return
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        values = torch.empty(self.lora_A.shape, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        self.start_from(Factors(A_RD=values, B_FR=self.lora_B))

    @torch.no_grad()
    def start_from(self, first: Factors, *, taken: Factors | None = None) -> None:
        """Take other first values; a magnitude becomes what changes no length.

        Args:
            first: The values.
            taken: What was taken out of the base.
        """
        self.lora_A.copy_(first.A_RD)
        self.lora_B.copy_(first.B_FR)
        if taken is not None:
            device = self.lora_A.device
            # Copies: where the first values are these, training moves those.
            self.taken_A, self.taken_B = (factor.to(device, copy=True) for factor in (taken.A_RD, taken.B_FR))
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self.row_lengths())

    def row_lengths(self) -> torch.Tensor:
        """Return the lengths of the rows of base and adapter together, (out_features,) in fp32."""
        if isinstance(self.base, Linear4bit):
            q = self.base.quantized.to(self.base.compute_device)
            weight = dequantize_4bit(q, dtype=torch.float32, workspace=self.workspace)
        else:
            weight = self.base.weight.detach()
        return row_lengths(weight, self.lora_A.detach(), self.lora_B.detach(), scaling=self.scaling)

    def adapter(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by PEFT's names."""
        return {name: parameter for name, parameter in self._parameters.items() if parameter is not None}

    def masters(self) -> dict[str, torch.Tensor]:
        """Return what is kept in fp32: the adapter, and what it has begun from where the base lacks that."""
        taken = {name: self._buffers[name] for name in ("taken_A", "taken_B")}
        return {**self.adapter(), **{name: factor for name, factor in taken.items() if factor is not None}}

    @property
    def acting(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What acts now as lora_A and lora_B; None where the base is alone."""
        if self.adapter_enabled:
            return self.lora_A, self.lora_B
        return None if self.taken_A is None or self.taken_B is None else (self.taken_A, self.taken_B)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """Return what the adapter adds to the weight, (out_features, in_features) in fp32, a magnitude left out."""
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
        is_base = not self.adapter_enabled and self.taken_A is None
        expanded = self.expanded if self.adapter_enabled or is_base else None
        if expanded is not None and not (self.training and self.dropout) and expanded.is_usable(x):
            return expanded.multiply(x, with_adapter=self.adapter_enabled)
        if is_base:
            return self.base(x)
        weight = self.base.home if isinstance(self.base, Linear4bit) else self.base.weight
        options = self._training_options if self.training and self.adapter_enabled else self._options
        if self.adapter_enabled and self.lora_magnitude_vector is not None:
            return self._forward_dora(x, weight, self.lora_magnitude_vector, options)
        assert self.acting is not None
        return lora_linear(x, weight, self.base.bias, *self.acting, options=options, workspace=self.workspace)

    def _forward_dora(
        self, x: torch.Tensor, weight: QuantizedTensor | torch.Tensor, magnitude: torch.Tensor, options: LoraOptions
    ) -> torch.Tensor:
        lengths = None if torch.is_grad_enabled() or self.training else self._kept_lengths()
        adapter = (self.lora_A, self.lora_B, magnitude)
        return dora_linear(
            x, weight, self.base.bias, adapter, options=options, workspace=self.workspace, lengths=lengths
        )

    def _kept_lengths(self) -> torch.Tensor:
        """Return the lengths of rows, made anew if the adapter has changed: not for every token that is generated."""
        state = (self.lora_A.data_ptr(), self.lora_A._version, self.lora_B.data_ptr(), self.lora_B._version)
        if self._lengths is None or self._lengths[0] != state:
            self._lengths = state, self.row_lengths()
        return self._lengths[1]

    def extra_repr(self) -> str:
        dora = ", DoRA" if self.lora_magnitude_vector is not None else ""
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:.4g}, dropout={self.dropout}{dora}"

    @torch.no_grad()
    def expand(self, dtype: torch.dtype) -> ExpandedWeight:
        """Return base and adapter expanded to `dtype`; as `expanded`, forwards without grad use it."""
        if isinstance(self.base, Linear4bit):
            base = self.base.expand(dtype)
        else:
            base = ExpandedWeight.of_base(self.base.weight.detach().to(dtype), self.base.bias)
        magnitude = self.lora_magnitude_vector
        gain_F = None if magnitude is None else magnitude / self.row_lengths()
        return ExpandedWeight.of_adapter(base, self.lora_A, self.lora_B, scaling=self.scaling, gain_F=gain_F)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoraLinear:
        masters = {name: tensor.data for name in MASTERS if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, before in masters.items():
            tensor = getattr(self, name)
            if tensor.dtype != before.dtype:
                tensor.data = before.to(tensor.device)
        return self


def scaling_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return the factor of an adapter's product."""
    return alpha / (math.sqrt(rank) if rslora else rank)
