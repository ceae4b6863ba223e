"""Part of the examples held out of training, to measure on what the model has not seen.

By example and by seed alone. Equal examples stay together: one of two on either side would be a question that was
trained on, and the measured loss would look better than it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

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
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.identity(), []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    held_out: set[int] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if wanted > 0 and not held_out:
        held_out = _smallest_group(shuffled, len(examples))
    training = [example for index, example in enumerate(examples) if index not in held_out]
    return training, [examples[index] for index in sorted(held_out)]


def _smallest_group(groups: list[list[int]], num_examples: int) -> set[int]:
    smallest = min(groups, key=len)
    if len(smallest) == num_examples:
        raise DataError(
            "all examples are equal, so none can be held out without being trained on. Give other held-out examples "
            "(data.held_out) or set data.held_out_fraction=0."
        )
    return set(smallest)
