"""The side of a chart: round numbers to stand on it, and where in the picture each value lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

ROUND_STEPS = (1, 2, 2.5, 5, 10)


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """Values low to high along the pixels start to end; a vertical one has its end above its start."""

    low: float
    high: float
    ticks: tuple[float, ...]
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def name(self, tick: float) -> str:
        """Return what stands at a tick."""
        return short_number(tick, largest=max(map(abs, self.ticks)))


def make_axis(
    values: Iterable[float], *, start: float, end: float, num_ticks: int = 4, from_zero: bool = False
) -> Axis:
    """Return an axis that begins and ends at a tick and has room for all values.

    Args:
        values: What it must have room for, at least one.
        start: Pixel of the lowest value.
        end: Pixel of the highest.
        num_ticks: About how many.
        from_zero: Begin at zero, whatever the lowest value is.
    """
    low, high = _range_of([*values, 0.0] if from_zero else list(values))
    step = _round_step((high - low) / num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, start, end)


def make_step_axis(steps: Iterable[float], *, start: float, end: float, num_ticks: int = 6) -> Axis:
    """Return an axis of whole numbers that begins and ends with the first and the last of them."""
    low, high = _range_of(list(steps))
    step = max(1, math.ceil(_round_step((high - low) / num_ticks)))
    ticks = tuple(float(tick) for tick in range(math.ceil(low / step) * step, math.floor(high) + 1, step))
    return Axis(low, high, ticks, start, end)


def short_number(value: float, *, largest: float | None = None) -> str:
    """Return a number for a tick: 1.5M, 20k, 0.25, 2e-4; in the unit of the largest one, so that an axis has one."""
    size = abs(value if largest is None else largest)
    for divisor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value and size >= max(divisor, 1e4):
            return f"{value / divisor:g}{suffix}"
    if value and size <= 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}" if size < 1e3 else f"{value:,.0f}"


def _range_of(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        # A flat line lies in the middle of its chart, zero on its floor.
        return (0.0, 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    return low, high


def _round_step(least: float) -> float:
    """Return the smallest round number that is not below `least`."""
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(step * magnitude for step in ROUND_STEPS if step * magnitude >= least * (1 - 1e-9))
