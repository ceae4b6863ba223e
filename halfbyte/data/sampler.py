"""The order of examples, a pure function of seed and epoch: a resumed run sees what the uninterrupted one would."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch.utils.data

# Batches are sorted by length within pools of this many: enough for little padding, few enough to stay random.
_POOL_BATCHES = 50


def make_order(num_items: int, *, seed: int, epoch: int) -> list[int]:
    """Return the indices 0 to num_items - 1, shuffled by seed and epoch."""
    order = list(range(num_items))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class ShuffledSampler(torch.utils.data.Sampler[int]):
    """All examples in random order.

    Args:
        num_examples: How many there are.
        seed: Decides the order, with the epoch.
    """

    def __init__(self, num_examples: int, *, seed: int) -> None:
        self.num_examples = num_examples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[int]:
        return iter(make_order(self.num_examples, seed=self.seed, epoch=self.epoch))


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """All examples, so ordered that consecutive batches hold examples of similar length.

    The batch with the longest example comes first: if memory does not suffice, that shows at the first step.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples that are padded together.
        seed: Decides the order, with the epoch.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = make_order(len(self.lengths), seed=self.seed, epoch=self.epoch)
        pool_size = self.batch_size * _POOL_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda index: -self.lengths[index])
            batches += [pool[at : at + self.batch_size] for at in range(0, len(pool), self.batch_size)]
        # A batch that is not full can only stand last: batches are cut from the flat order again.
        rest = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        random.Random(f"{self.seed}/{self.epoch}/batches").shuffle(batches)
        if batches:
            longest = max(range(len(batches)), key=lambda batch: self.lengths[batches[batch][0]])
            batches[0], batches[longest] = batches[longest], batches[0]
        return iter([index for batch in [*batches, rest] for index in batch])
