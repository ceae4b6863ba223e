"""One model over several cards of one process: whole decoder blocks on each in turn, activations passed along.

    first card    embedding, blocks 0 .. i;  final norm, head and loss
    second card                 blocks i + 1 .. j
    ...

What is not a block lives on the first card, so that whoever gives a batch and takes a loss sees one device. A block
finds its input on its own card: the block before it has sent it there. What all blocks share (angles, masks, boundaries
of documents) is copied to a card once a pass. Autograd sends gradients the same way back.

At any time one card computes and the others wait: this makes room for a model, not speed. Ranks under torchrun, each
with a card of its own, make speed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError

DEVICE_MAP = "hf_device_map"
"""The attribute by which transformers, accelerate and peft know that a model must not be moved as a whole."""
# Bytes of a weight in 4 bits, with its scales.
BYTES_4BIT = 0.53
FLEX = "flex_attention"


@dataclasses.dataclass(frozen=True, slots=True)
class CardSplit:
    """Which decoder block lives on which card."""

    home: torch.device
    """Where all else lives."""
    cards: Mapping[str, torch.device]
    """By path of a block, in order."""

    def card_of(self, path: str) -> torch.device:
        """Return where a module or parameter belongs."""
        block = next((block for block in self.cards if path == block or path.startswith(f"{block}.")), None)
        return self.home if block is None else self.cards[block]

    def __str__(self) -> str:
        runs = [(card, len(list(group))) for card, group in itertools.groupby(self.cards.values())]
        parts, first = [], 0
        for card, count in runs:
            blocks = f"block {first}" if count == 1 else f"blocks {first} to {first + count - 1}"
            parts.append(f"{blocks} on {card}")
            first += count
        return (
            f"divided among {len(set(self.cards.values()) | {self.home})} cards: {', '.join(parts)}; all else on "
            f"{self.home}"
        )


def split_over_cards(
    model: PreTrainedModel, shares: Mapping[torch.device, float], *, targets: Collection[str], itemsize: int
) -> CardSplit:
    """Give each card its share of a model's bytes, whole blocks in order.

    Args:
        model: On the meta device.
        shares: How much each card is to take, in any unit; the first is home of what is not a block.
        targets: Paths of the layers that will be in 4 bits.
        itemsize: Bytes of a number that is not.

    Raises:
        ConfigError: The model has no blocks that are known, or attends in a way that is bound to one card.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no decoder blocks that could go to several cards; name one with device_map"
        )
    if model.config._attn_implementation == FLEX:
        raise ConfigError(f"attention {FLEX} works on one card; name one with device_map, or choose another attention")
    sizes = dict.fromkeys(blocks, 0.0)
    rest = 0.0
    for name, parameter in model.named_parameters():
        held = parameter.numel() * (BYTES_4BIT if name.rpartition(".")[0] in targets else itemsize)
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            rest += held
        else:
            sizes[block] += held
    return CardSplit(next(iter(shares)), dict(zip(blocks, _divide(list(sizes.values()), rest, shares), strict=True)))


def _divide(sizes: list[float], rest: float, shares: Mapping[torch.device, float]) -> list[torch.device]:
    """Lay all bytes in a row, the rest first, and return the card in whose stretch the middle of each block lies."""
    total, all_shares = rest + sum(sizes), sum(shares.values())
    ends = [total * share / all_shares for share in itertools.accumulate(shares.values())]
    cards, chosen, start = list(shares), [], rest
    for size in sizes:
        middle = start + size / 2
        chosen.append(next((card for card, end in zip(cards, ends, strict=True) if middle <= end), cards[-1]))
        start += size
    return chosen


def find_blocks(model: PreTrainedModel) -> list[str]:
    """Return the paths of a model's decoder blocks: members of a list, of a class that its family keeps whole."""
    whole = set(model._no_split_modules or ())
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, child in module.named_children()
        if type(child).__name__ in whole
    ]


def pass_along_(model: PreTrainedModel, split: CardSplit) -> None:
    """Have blocks send what they give to the card of the next one, and find what all share on their own."""
    copies = {card: _Copies(card) for card in split.cards.values() if card != split.home}
    following = itertools.chain(itertools.islice(split.cards.values(), 1, None), [split.home])
    for (path, card), after in zip(split.cards.items(), following, strict=True):
        block = model.get_submodule(path)
        # What no file holds was computed at home.
        block.to(card)
        if card != split.home:
            block.register_forward_pre_hook(functools.partial(_fetch, copies[card]), with_kwargs=True)
        if card != after:
            block.register_forward_hook(functools.partial(_send, after))
    others = [path for path, module in model.named_modules() if module._parameters]
    outside = [path for path in others if not any(path.startswith(f"{block}.") for block in split.cards)]
    places = {**dict.fromkeys(outside, split.home), **split.cards}
    setattr(model, DEVICE_MAP, {path: _index_of(card) for path, card in places.items()})


def cards_of(model: nn.Module, home: torch.device) -> tuple[torch.device, ...]:
    """Return the cards on which a model lives, home first."""
    places = (getattr(model, DEVICE_MAP, None) or {}).values()
    cards = [torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in places]
    return tuple(dict.fromkeys([home, *cards]))


def is_divided(model: nn.Module) -> bool:
    """Return whether a model lives on several cards."""
    return len(set((getattr(model, DEVICE_MAP, None) or {}).values())) > 1


class _Copies:
    """Copies on one card of what all its blocks share, as long as the originals live."""

    def __init__(self, card: torch.device) -> None:
        self.card = card
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}

    def of(self, value: Any) -> Any:
        """Return tensors on the card; tuples, lists and dicts of them too, and all else as it is."""
        if isinstance(value, torch.Tensor):
            return value if value.device == self.card else self._copy_of(value)
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            return type(value)(map(self.of, value))
        return {key: self.of(one) for key, one in value.items()} if type(value) is dict else value

    def _copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        # What is made in inference mode cannot be used in training, and knows no version.
        if tensor.requires_grad or torch.is_inference_mode_enabled() or tensor.is_inference():
            return tensor.to(self.card)
        found = self._known.get(id(tensor))
        if found is not None and found[0]() is tensor and found[1] == tensor._version:
            return found[2]
        self._known = {key: known for key, known in self._known.items() if known[0]() is not None}
        copy = tensor.to(self.card)
        self._known[id(tensor)] = weakref.ref(tensor), tensor._version, copy
        return copy


def _fetch(copies: _Copies, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return copies.of(args), copies.of(kwargs)


def _send(card: torch.device, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.to(card)
    return (output[0].to(card), *output[1:])


def _index_of(card: torch.device) -> int | str:
    return card.index if card.type == "cuda" else str(card)
