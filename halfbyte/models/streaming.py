"""Models whose frozen weights live elsewhere than where they compute, all of them or those of some decoder blocks.

A block's weights go to its slab in host memory as soon as its last one is there, so that a checkpoint of any size is
loaded through the memory of one block. Fused blocks then have them brought to the device ahead of their use; the path
for any architecture fetches each weight when it is expanded, which costs the link's time.

Which blocks: spread over the model, so that those that stay give the link time for those that come.

Several ranks of one host may divide these blocks among their cards instead, in turn: a block lives on one card as it
would alone, and visits the others from there, see `peer_memory`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.distributed import World, current_world
from halfbyte.errors import ConfigError
from halfbyte.memory.block_streamer import BlockStreamer
from halfbyte.memory.host_memory import allocate_on_disk, allocate_pinned, allocate_shared
from halfbyte.memory.peer_memory import allocate_at
from halfbyte.memory.run_shape import DEFAULT_SLOTS
from halfbyte.memory.weight_slab import WeightSlab, slab_bytes
from halfbyte.models.fused_layers import STREAMED, FusedLayer, iter_decoder_layers
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.streamed_block import StreamedBlock, quantized_layers
from halfbyte.quant import QuantizedTensor

STREAMER_ATTRIBUTE = "halfbyte_streamer"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Residency:
    """Which frozen weights live in host memory."""

    streamed_blocks: int = 0
    """How many decoder blocks' 4-bit weights do, and visit the device."""
    embedding_on_host: bool = False
    """Whether the embedding does, where it is not also the head."""
    spill_folder: Path | None = None
    """Where the blocks' weights lie in files instead, for want of host memory."""
    on_cards: bool = False
    """Whether those blocks are divided among the cards of this host's ranks instead."""


ON_DEVICE = Residency()


class SlabFiller:
    """Takes the 4-bit weights of a model that is being loaded, and puts those of some blocks into slabs.

    Args:
        model: On the meta device.
        targets: Paths of the layers that will have 4-bit weights.
        count: How many blocks are to live in host memory.
        device: Where they compute.
        num_slots: See `BlockStreamer`.
        spill_folder: Where slabs lie in files instead.
        on_cards: Whether they are divided among the cards of this host's ranks instead.

    Raises:
        ConfigError: The model has fewer blocks with 4-bit weights, or none that are known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        targets: Collection[str],
        count: int,
        device: torch.device,
        num_slots: int = DEFAULT_SLOTS,
        spill_folder: Path | None = None,
        on_cards: bool = False,
    ) -> None:
        self.device, self.num_slots, self.spill_folder = device, num_slots, spill_folder
        named = _named_blocks(model)
        blocks = [block for block in named if any(path.startswith(f"{block}.") for path in targets)]
        if count > len(blocks):
            raise ConfigError(
                f"memory.streamed_blocks is {count}, but {type(model).__name__} has {len(blocks)} decoder blocks with "
                "weights in 4 bits"
            )
        chosen = spread(count, len(blocks))
        self._paths = [path for index, path in enumerate(blocks) if index in chosen]
        self._world = current_world()
        self._owners = dict(zip(self._paths, _owners_of(count, self._world, on_cards=on_cards), strict=True))
        self._waiting: dict[str, dict[str, QuantizedTensor]] = collections.defaultdict(dict)
        self._slabs: dict[str, WeightSlab] = {}

    def take(self, path: str, q: QuantizedTensor, *, siblings: Callable[[str], int]) -> dict[str, QuantizedTensor]:
        """Take one more weight.

        Args:
            path: Of its layer.
            q: The weight.
            siblings: Gives the number of 4-bit layers under a block's path.

        Returns:
            What lives elsewhere from now on, by path: all weights of a block, when this was the last of them.
        """
        block = next((one for one in self._paths if path.startswith(f"{one}.")), None)
        if block is None:
            return {}
        waiting = self._waiting[block]
        waiting[path.removeprefix(f"{block}.")] = q
        if len(waiting) < siblings(block):
            return {}
        weights, owner = self._waiting.pop(block), self._owners[block]
        self._slabs[block] = slab = make_slab(
            weights, self.device, world=self._world, spill_folder=self.spill_folder, owner=owner
        )
        return {f"{block}.{name}": weight for name, weight in slab.weights.items()}

    def finish_(self, model: PreTrainedModel) -> None:
        """Give the loaded model its streamer."""
        streamer = BlockStreamer(self.device, num_slots=self.num_slots)
        for path in self._paths:
            if self._owners[path] != self._world.local_rank:
                _settle_(model.get_submodule(path), self._slabs[path], streamer)
        setattr(model, STREAMER_ATTRIBUTE, streamer)


def stream_blocks_(
    model: PreTrainedModel,
    count: int,
    *,
    device: torch.device,
    num_slots: int = DEFAULT_SLOTS,
    spill_folder: Path | None = None,
    on_cards: bool = False,
    world: World | None = None,
) -> BlockStreamer:
    """Move the frozen 4-bit weights of some decoder blocks to where they visit from; the model stays usable as it is.

    Args:
        model: Loaded, with or without adapters and fused blocks. Changed in place.
        count: How many blocks, spread over the model.
        device: Where they compute.
        num_slots: See `BlockStreamer`.
        spill_folder: Where slabs lie in files instead.
        on_cards: Whether they are divided among the cards of this host's ranks instead.
        world: Ranks that all call this, and share what visits; all there are, unless given.

    Raises:
        ConfigError: The model has fewer blocks, or none that are known.
    """
    blocks = list(iter_decoder_layers(model))
    if count > len(blocks):
        raise ConfigError(f"{count} blocks are to live in host memory, but {type(model).__name__} has {len(blocks)}")
    world = world or current_world()
    streamer = BlockStreamer(device, num_slots=num_slots)
    owners = _owners_of(count, world, on_cards=on_cards)
    for index, owner in zip(sorted(spread(count, len(blocks))), owners, strict=True):
        weights = quantized_layers(blocks[index])
        slab = make_slab(weights, device, world=world, spill_folder=spill_folder, owner=owner)
        if owner == world.local_rank:
            _move_(blocks[index], slab)
        else:
            _settle_(blocks[index], slab, streamer)
    setattr(model, STREAMER_ATTRIBUTE, streamer)
    return streamer


def streamer_of(model: nn.Module) -> BlockStreamer | None:
    """Return what brings the weights of a model to its device, if they live elsewhere."""
    streamer: BlockStreamer | None = getattr(model, STREAMER_ATTRIBUTE, None)
    return streamer


def is_streamed(model: nn.Module) -> bool:
    """Say whether weights of a model live elsewhere than where they are used."""
    return any(isinstance(module, Linear4bit) and module.lives_elsewhere for module in model.modules())


def make_slab(
    weights: Mapping[str, QuantizedTensor],
    device: torch.device,
    *,
    world: World,
    spill_folder: Path | None = None,
    owner: int | None = None,
) -> WeightSlab:
    """Put the weights of a block into host memory from which `device` can be fed, into a file, or onto one card.

    The ranks of a host have one copy, which one of them writes: the owner, or the first.

    Args:
        weights: By name.
        device: Where they are used.
        world: Ranks that all call this.
        spill_folder: Where the file is to be.
        owner: Number among the ranks of this host, of that on whose device they are to live.
    """
    num_bytes, file, on_gpu = slab_bytes(weights), None, device.type == "cuda"
    if owner is not None:
        memory = allocate_at(owner, num_bytes, world=world, device=device)
    elif spill_folder is not None:
        memory, file = allocate_on_disk(num_bytes, spill_folder, world)
    elif world.local_size > 1:
        memory = allocate_shared(num_bytes, world, is_pinned=on_gpu)
    else:
        memory = allocate_pinned(num_bytes) if on_gpu else torch.empty(num_bytes, dtype=torch.uint8)
    slab = WeightSlab(weights, memory, file=file, is_filled=world.local_rank != (owner or 0))
    if on_gpu and owner is not None:
        # What others read is there, not on its way.
        torch.cuda.synchronize(device)
    world.wait()
    return slab


def spread(count: int, total: int) -> set[int]:
    """Return `count` of `total` places, as evenly as it goes."""
    return {index * total // count for index in range(count)}


def _owners_of(count: int, world: World, *, on_cards: bool) -> list[int | None]:
    """Return on which rank's card of its host each block that visits lives, in turn; None for those on no card."""
    return [index % world.local_size if on_cards else None for index in range(count)]


def _named_blocks(model: PreTrainedModel) -> list[str]:
    blocks = set(iter_decoder_layers(model))
    return [path for path, module in model.named_modules() if module in blocks]


def _move_(block: nn.Module, slab: WeightSlab) -> None:
    """Have the layers of a block use their weights in a slab on the device itself."""
    for path, layer in block.named_modules():
        if isinstance(layer, Linear4bit):
            layer.take(slab.weights[path])
    _make_anew_(block)


def _settle_(block: nn.Module, slab: WeightSlab, streamer: BlockStreamer) -> None:
    # Not a submodule, nor part of the state dict.
    object.__setattr__(block, STREAMED, StreamedBlock(block, slab, streamer))
    _make_anew_(block)


def _make_anew_(block: nn.Module) -> None:
    """Have a fused block look for its parts again."""
    if isinstance(block, FusedLayer):
        block.halfbyte_binding.modules = ()
