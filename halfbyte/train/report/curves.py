"""From what a trainer has logged to curves: points by step, and a smoothed line through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SMOOTHED_SHARE = 1 / 15


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


def curve_of(history: Sequence[Mapping[str, float]], name: str) -> tuple[Point, ...]:
    """Return what was logged under a name; values that are not finite have no place in a picture and are left out."""
    return tuple(
        Point(int(entry["step"]), float(entry[name]))
        for entry in history
        if name in entry and math.isfinite(entry[name])
    )


def smooth(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the running mean that forgets over a fifteenth of the curve, without a pull towards its start.

    mean_t = (1 - d) v_t + d mean_t-1, divided by 1 - d^t, which makes the first mean the first value.
    """
    decay = 1 - 1 / max(2.0, len(points) * SMOOTHED_SHARE)
    mean, smoothed = 0.0, []
    for number, (step, value) in enumerate(points, start=1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(Point(step, mean / (1 - decay**number)))
    return tuple(smoothed)
