"""A module that is trained whole beside the adapters (PEFT's modules_to_save).

The original stays as it is, frozen; a copy of it in fp32 is trained and used in its place. A 16-bit original keeps
its dtype towards the rest of the model: the copy's parameters are cast for each use, so that gradients and updates
are fp32 while activations stay 16-bit. A 4-bit original is trained from what its weight dequantises to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfbyte.nn.convert import replace_module
from halfbyte.nn.linear import Linear4bit


class SavedModule(nn.Module):
    """A trainable fp32 copy beside its frozen original; disabled, it is the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.trained = _trainable_copy(original)
        self.adapter_enabled = True

    @classmethod
    def from_module(cls, module: nn.Module) -> SavedModule:
        """Wrap a module; `unwrap` is the inverse."""
        return cls(module)

    def unwrap(self) -> nn.Module:
        """Return the frozen original alone."""
        return self.original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.adapter_enabled:
            return self.original(*args, **kwargs)
        dtype = self._compute_dtype(args)
        parameters = {name: p.to(dtype) for name, p in self.trained.named_parameters()}
        return torch.func.functional_call(self.trained, parameters, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the model asks of the module it knows (weight, num_embeddings) is answered by the one in use.
            return getattr(self.trained if self.adapter_enabled else self.original, name)

    def _compute_dtype(self, args: tuple[Any, ...]) -> torch.dtype:
        inputs = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        # An embedding kept in 16 bits under fp32 products says so itself.
        widened = getattr(self.original, "compute_dtype", None)
        own = [widened] if widened else [p.dtype for p in self.original.parameters() if p.is_floating_point()]
        return (inputs or own or [torch.float32])[0]


def _trainable_copy(original: nn.Module) -> nn.Module:
    if hasattr(original, "to_compute_device"):
        # It lives in host memory, where nothing is trained.
        make: Callable[[], nn.Module] = original.to_compute_device  # type: ignore[assignment]
        return make().requires_grad_(True)
    trained = nn.ModuleDict({"root": copy.deepcopy(original)})
    for name, module in list(trained.named_modules()):
        if isinstance(module, Linear4bit):
            replace_module(trained, name, plain_linear(module))
    return trained["root"].float().requires_grad_(True)


def plain_linear(module: Linear4bit) -> nn.Linear:
    """Return an fp32 layer of what a 4-bit layer dequantises to."""
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = nn.Parameter(module.weight.float())
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().float())
    return plain
