"""The frozen 4-bit layers of a decoder block whose weights live elsewhere: in host memory, or on another card.

The layers keep their tensors, names and state dict; these lie side by side in one slab, wherever that is. While the
block is on the device, a layer's `quantized` is what is there. Products outside fused blocks fetch a layer's weight
themselves whenever they expand it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from halfbyte.memory.block_streamer import BlockStreamer
from halfbyte.memory.weight_slab import WeightSlab
from halfbyte.nn.linear import Linear4bit
from halfbyte.quant.tensor import QuantizedTensor


class StreamedBlock:
    """One block, as a tenant of a streamer.

    Args:
        block: The module whose 4-bit layers they are.
        slab: Their weights, by their paths in `block`.
        streamer: Of the model.
    """

    def __init__(self, block: nn.Module, slab: WeightSlab, streamer: BlockStreamer) -> None:
        self.slab, self.streamer = slab, streamer
        self.layers = {path: layer for path, layer in block.named_modules() if isinstance(layer, Linear4bit)}
        for path, layer in self.layers.items():
            layer.live_elsewhere(slab.weights[path], streamer.device)
        self.index = streamer.admit(self)

    def arrive(self, *, backward: bool) -> None:
        """Have the weights on the device for what is launched next; see `BlockStreamer.enter`."""
        self.streamer.enter(self.index, backward=backward)

    def settle(self, weights: Mapping[str, QuantizedTensor]) -> None:
        for path, layer in self.layers.items():
            layer.visitor = weights[path]

    def leave(self) -> None:
        for layer in self.layers.values():
            layer.visitor = None


def quantized_layers(block: nn.Module) -> dict[str, QuantizedTensor]:
    """Return the 4-bit weights of a block by their paths in it."""
    return {path: layer.quantized for path, layer in block.named_modules() if isinstance(layer, Linear4bit)}
