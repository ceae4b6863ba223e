"""From what a trainer has logged to curves: points by step, and a smoothed line through them."""

from __future__ import annotations

import itertools
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
    """Return the mean of each point and its neighbours, a fifteenth of all.

    They are as many before a point as after it, so that the curve has no lag; towards the ends there are fewer of them,
    but never so few that the curve ends in a spike.
    """
    sums = list(itertools.accumulate((point.value for point in points), initial=0.0))
    widest = max(1, round(len(points) * SMOOTHED_SHARE / 2))
    smoothed = []
    for index, point in enumerate(points):
        radius = max(min(widest, index, len(points) - 1 - index), widest // 3)
        first, last = max(index - radius, 0), min(index + radius, len(points) - 1)
        smoothed.append(Point(point.step, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return tuple(smoothed)
