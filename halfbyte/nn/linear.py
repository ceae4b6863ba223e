"""A frozen linear layer whose weight is kept in 4 bits.

The tensors of the weight are buffers: `.to(device)` moves them, and no `.half()`, `.float()` or `.to(dtype)` touches
them, for a scale in another dtype would be another weight. The bias is a frozen parameter like any other. The state
dict has bitsandbytes' keys, so that a checkpoint of ours loads in plain transformers.

A weight may live elsewhere than where the layer multiplies, see `halfbyte.nn.streamed_block`. Then
`.to(device)` leaves it where it lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfbyte.nn.expanded import ExpandedWeight
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.linear_4bit import linear_4bit
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.bnb_format import export_state_dict, is_quantized_key, load_quantized
from halfbyte.quant.tensor import QuantizedTensor, QuantSpec

TENSOR_NAMES = ("packed", "absmax", "absmax_scale", "absmax_offset")


class Linear4bit(nn.Module):
    """y = x W' + b with W frozen and kept in 4 bits; the dtype of x decides the dtype of the product."""

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_scale: torch.Tensor | None
    absmax_offset: torch.Tensor | None

    def __init__(self, q: QuantizedTensor, bias: torch.Tensor | None, workspace: Workspace) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.workspace = workspace
        self.expanded: ExpandedWeight | None = None
        self.visitor: QuantizedTensor | None = None
        """A copy of the weight on the device, if it lives elsewhere and is there at the moment."""
        self._streamed_to: torch.device | None = None
        for name in TENSOR_NAMES:
            self.register_buffer(name, None)
        self.take(q)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: QuantSpec, *, workspace: Workspace | None = None) -> Linear4bit:
        """Quantise the weight of `linear`; its bias is shared, not copied."""
        return cls.from_quantized(quantize_4bit(linear.weight.detach(), spec), linear.bias, workspace or Workspace())

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: torch.Tensor | None, workspace: Workspace) -> Linear4bit:
        """Build a layer around a weight that is already in 4 bits."""
        return cls(q, bias, workspace)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight in 4 bits: this layer's buffers or, if they live elsewhere, their copy that is on the device."""
        return self.visitor or self.home

    @property
    def compute_device(self) -> torch.device:
        """Where the layer multiplies."""
        return self._streamed_to or self.packed.device

    @property
    def lives_elsewhere(self) -> bool:
        """Whether the weight is in host memory, or on another card, while the layer multiplies on a device."""
        return self._streamed_to is not None

    def live_elsewhere(self, q: QuantizedTensor, device: torch.device) -> None:
        """Take the same weight in other memory, and multiply on `device`."""
        self.take(q)
        self._streamed_to = device

    @property
    def home(self) -> QuantizedTensor:
        """The weight where it lives, which stays valid for a backward to come."""
        return QuantizedTensor(
            packed=self.packed,
            absmax=self.absmax,
            absmax_scale=self.absmax_scale,
            absmax_offset=self.absmax_offset,
            codebook=self._spec.codebook,
            block_size=self._spec.block_size,
            shape=(self.out_features, self.in_features),
            dtype=self._weight_dtype,
        )

    @property
    def weight(self) -> torch.Tensor:
        """The weight expanded into a new tensor of its original dtype: right for whoever reads it, and not cheap."""
        return dequantize_4bit(self.quantized.to(self.compute_device), workspace=self.workspace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.expanded is not None and self.expanded.is_usable(x):
            return self.expanded.multiply(x, with_adapter=False)
        return linear_4bit(x, self.home, self.bias, workspace=self.workspace)

    @torch.no_grad()
    def expand(self, dtype: torch.dtype) -> ExpandedWeight:
        """Return the weight expanded to `dtype`; as `expanded`, forwards without grad use it."""
        q = self.quantized.to(self.compute_device)
        return ExpandedWeight.of_base(dequantize_4bit(q, dtype=dtype, workspace=self.workspace), self.bias)

    def extra_repr(self) -> str:
        spec = self._spec
        double = ", double_quant" if spec.double_quant else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{spec.codebook}, block_size={spec.block_size}{double}"
        )

    def take(self, q: QuantizedTensor) -> None:
        """Use a weight of the same shape, or the same weight in other memory."""
        self._spec, self._weight_dtype = q.spec, q.dtype
        for name in TENSOR_NAMES:
            setattr(self, name, getattr(q, name))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear4bit:
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        if self.lives_elsewhere:
            self._buffers.update(before)
            return self
        for name, tensor in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(export_state_dict(prefix, self.home))
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if prefix + "weight" in mine:
            q = load_quantized(prefix, mine)
            if self.lives_elsewhere:
                error_msgs.append(f"{prefix}weight does not live on the device; load into a model whose weights do")
            elif q.shape == (self.out_features, self.in_features):
                self.take(q.to(self.packed.device))
            else:
                error_msgs.append(
                    f"{prefix}weight has the shape {q.shape}, not {(self.out_features, self.in_features)}"
                )
        elif strict:
            missing_keys.append(prefix + "weight")
        bias = mine.get(prefix + "bias")
        if bias is not None and self.bias is not None:
            self.bias.data.copy_(bias)
        elif strict and self.bias is not None:
            missing_keys.append(prefix + "bias")
        known = {prefix + "weight"} | ({prefix + "bias"} if self.bias is not None else set())
        if strict:
            unexpected_keys.extend(key for key in mine if key not in known and not is_quantized_key(key))
