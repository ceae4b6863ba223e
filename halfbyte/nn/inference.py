"""Trade memory for speed while generating."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear


@contextlib.contextmanager
def expanded_for_inference(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Keep every 4-bit weight of a model expanded inside the `with` block.

    One generated token uses each weight once, so expanding them all for each token costs more than the products
    themselves. Inside the block that is done once. The price is memory, `expanded_nbytes` of it beside the 4-bit
    weights, freed at the end of the block.

    Only forwards without grad are affected, and the adapter stays beside its base, unmerged. The block must not
    outlive a change of the adapter: its values are cast at the start.

    Args:
        model: With or without adapters.
        dtype: What the weights are expanded to; `default_expanded_dtype` unless given. Activations may have another.
    """
    dtype = dtype or default_expanded_dtype(model)
    layers = [layer for layer in _expandable(model) if layer.expanded is None]
    try:
        for layer in layers:
            layer.expanded = layer.expand(dtype)
        yield
    finally:
        for layer in layers:
            layer.expanded = None


def default_expanded_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which one token is multiplied fastest: fp32 on a CPU, on a GPU that of the model."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    devices = [m.compute_device for m in model.modules() if isinstance(m, Linear4bit)] or [p.device for p in frozen]
    on_cpu = not frozen or devices[0].type == "cpu"
    return torch.float32 if on_cpu else frozen[0].dtype


def expanded_nbytes(model: nn.Module, *, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that `expanded_for_inference` takes."""
    dtype = dtype or default_expanded_dtype(model)
    elements = sum(layer.in_features * layer.out_features for layer in _expandable(model))
    return elements * dtype.itemsize


def _expandable(model: nn.Module) -> list[LoraLinear | Linear4bit]:
    """Return the layers with a 4-bit weight, a layer with an adapter in the place of its base."""
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear) and isinstance(m.base, Linear4bit)]
    bases = {layer.base for layer in adapted}
    return [*adapted, *(m for m in model.modules() if isinstance(m, Linear4bit) and m not in bases)]
