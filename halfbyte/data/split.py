"""Part of the examples held out of training, to measure on what the model has not seen.

By example and by seed alone. Equal examples stay together: one of two on either side would be a question that was
trained on, and the measured loss would look better than it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from halfbyte.data.examples import Example
from halfbyte.errors import DataError

_MIN_EXAMPLES = 10


def split_held_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and those held out.

    Args:
        examples: All examples.
        fraction: Share to hold out, 0 to below 1. Above 0, at least one of ten or more examples is held out.
        seed: Decides which.

    Returns:
        Examples to train on and held-out examples, both in the order they came in.

    Raises:
        DataError: The fraction is out of range, or no example can be held out because nearly all are equal.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"held_out_fraction is {fraction}, must be at least 0 and below 1.")
    wanted = round(fraction * len(examples))
    if fraction > 0 and len(examples) >= _MIN_EXAMPLES:
        wanted = max(wanted, 1)
    wanted = min(wanted, len(examples) - 1)
    if wanted <= 0:
        return list(examples), []
    group_of = _number_groups(examples)
    sizes: list[int] = np.bincount(group_of).tolist()
    shuffled = list(range(len(sizes)))
    random.Random(seed).shuffle(shuffled)
    held_out: set[int] = set()
    num_held_out = 0
    for group in shuffled:
        if num_held_out + sizes[group] <= wanted:
            held_out.add(group)
            num_held_out += sizes[group]
    if not held_out:
        held_out.add(_smallest_group(shuffled, sizes))
    training = [example for example, group in zip(examples, group_of, strict=True) if group not in held_out]
    return training, [example for example, group in zip(examples, group_of, strict=True) if group in held_out]


def _number_groups(examples: Sequence[Example]) -> list[int]:
    """Return which group each example is in; equal examples are one, and the groups are numbered as they come."""
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(example.identity(), len(numbers)) for example in examples]


def _smallest_group(groups: Sequence[int], sizes: Sequence[int]) -> int:
    if len(groups) == 1:
        raise DataError(
            "all examples are equal, so none can be held out without being trained on. Give other held-out examples "
            "(data.held_out) or set data.held_out_fraction=0."
        )
    return min(groups, key=sizes.__getitem__)
