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
    themselves. Inside the block that is done once, and a layer with its adapter becomes two small products. The price
    is memory: the model's full size in `dtype` beside the 4-bit weights, freed at the end of the block.

    Only forwards without grad are affected, and the adapter stays beside its base, unmerged. The block must not
    outlive a change of the adapter: its values are cast at the start.

    Args:
        model: With or without adapters.
        dtype: What the weights are expanded to and the activations have; that of the model's plain parameters
            unless given.
    """
    frozen = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    dtype = dtype or next(frozen, torch.float32)
    wrapped = [m for m in model.modules() if isinstance(m, LoraLinear) and isinstance(m.base, Linear4bit)]
    bases = {layer.base for layer in wrapped}
    alone = [m for m in model.modules() if isinstance(m, Linear4bit) and m not in bases]
    both: list[LoraLinear | Linear4bit] = [*wrapped, *alone]
    layers = [layer for layer in both if not layer.is_expanded]
    try:
        for layer in layers:
            layer.expand(dtype)
        yield
    finally:
        for layer in layers:
            layer.release()
