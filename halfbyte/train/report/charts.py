"""Charts as inline SVG: lines over steps, a histogram, bars of parts. Colours are the page's, by class.

A chart is drawn in the pixels it is meant to be seen in, so that its letters have the size of the page's. Whatever is
under the pointer tells its value: each carries a `title`, which page.js also shows beside the chart's heading.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from halfbyte.train.report.axis import Axis, make_axis, make_step_axis
from halfbyte.train.report.curves import Point
from halfbyte.train.report.markup import Markup, element, join

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
# Narrower places to point at than this cannot be told apart.
HOVER_PIXELS = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    points: tuple[Point, ...]
    style: str
    """Class by which the page colours it."""
    has_dots: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LineChart:
    """Lines over steps that share one axis; at least one of them has a point."""

    lines: tuple[Line, ...]
    say: Callable[[float], str]
    """A value with its unit."""
    from_zero: bool = False
    limit: float | None = None
    """Where a dashed line is drawn across."""

    def describe(self, title: str) -> str:
        """Return in words what the chart shows, for those who do not see it."""
        parts = [
            f"{line.name} from {self.say(line.points[0].value)} at step {line.points[0].step} "
            f"to {self.say(line.points[-1].value)} at step {line.points[-1].step}"
            for line in self.lines
            if line.points
        ]
        return f"{title} by step: {'; '.join(parts)}"


def draw_lines(chart: LineChart, title: str, *, width: int, height: int) -> Markup:
    """Return a line chart of so many pixels."""
    points = [point for line in chart.lines for point in line.points]
    limits = [] if chart.limit is None else [chart.limit]
    x = make_step_axis((point.step for point in points), start=LEFT, end=width - RIGHT, num_ticks=width // 90)
    values = [*(point.value for point in points), *limits]
    y = make_axis(values, start=height - BOTTOM, end=TOP, num_ticks=4, from_zero=chart.from_zero)
    return _svg(
        chart.describe(title),
        width,
        height,
        _value_axis(y, x),
        _step_axis(x, y),
        *(_limit(limit, x, y) for limit in limits),
        *(_curve(line, x, y) for line in chart.lines if line.points),
        *_hovers(chart, x, y),
    )


def draw_histogram(
    bins: Sequence[tuple[str, int]], *, title: str, unit: str, counted: str, width: int, height: int
) -> Markup:
    """Return bars of counts.

    Args:
        bins: Name and count of each, in order.
        title: What the counts are of, for those who do not see them.
        unit: Of the names.
        counted: What is counted.
        width: Of the picture in pixels.
        height: The same.
    """
    x = Axis(0, len(bins), (), LEFT, width - RIGHT)
    y = make_axis([count for _, count in bins], start=height - BOTTOM, end=TOP, from_zero=True)
    bars = [
        element(
            "g",
            element("rect", class_="target", x=x.at(index), y=y.end, width=x.at(1) - x.start, height=y.start - y.end),
            element(
                "rect",
                class_="bar",
                x=x.at(index) + 1.5,
                y=y.at(count),
                width=x.at(1) - x.start - 3,
                height=y.start - y.at(count),
                rx=2,
            ),
            element("title", f"{name} {unit}: {count:,} {counted}"),
            class_="hover",
        )
        for index, (name, count) in enumerate(bins)
    ]
    # Names such as "61-90" need 44 pixels.
    every = max(1, -(-44 * len(bins) // (width - LEFT - RIGHT)))
    names = [
        element("text", name, class_="tick", x=x.at(index + 0.5), y=y.start + 16, text_anchor="middle")
        for index, (name, _) in enumerate(bins)
        if index % every == 0
    ]
    unit_text = element("text", unit, class_="unit", x=x.end, y=y.start + 31, text_anchor="end")
    words = "; ".join(f"{name} {unit}: {count}" for name, count in bins)
    return _svg(f"{title}: {words}", width, height, _value_axis(y, x), *bars, *names, unit_text)


def draw_parts(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, title: str, say: Callable[[float], str], width: int
) -> Markup:
    """Return a bar for each row, made of its parts side by side, all to one scale.

    Args:
        rows: Name of each, and its parts by name and value.
        title: What they are, for those who do not see them.
        say: A value with its unit.
        width: Of the picture in pixels.
    """
    bar, gap = 26, 30
    height = len(rows) * (bar + gap)
    longest = max(sum(value for _, value in parts) for _, parts in rows)
    x = Axis(0, longest, (), 0, width)
    drawn = []
    for number, (name, parts) in enumerate(rows):
        y = number * (bar + gap)
        total = say(sum(value for _, value in parts))
        drawn.append(element("text", name, class_="row-name", x=0, y=y + 14))
        drawn.append(element("text", total, class_="row-value", x=width, y=y + 14, text_anchor="end"))
        before = 0.0
        for index, (part, value) in enumerate(parts):
            left = x.at(before)
            drawn.append(
                element(
                    "g",
                    element(
                        "rect",
                        class_=f"part part-{index if len(parts) > 1 else 'whole'}",
                        x=left,
                        y=y + 22,
                        width=max(x.at(before + value) - left - 1, 1),
                        height=bar,
                        rx=2,
                    ),
                    element("title", f"{part}: {say(value)}"),
                    class_="hover",
                )
            )
            before += value
    words = "; ".join(f"{name} {say(sum(value for _, value in parts))}" for name, parts in rows)
    return _svg(f"{title}: {words}", width, height, *drawn)


def _svg(label: str, width: int, height: int, *content: Markup) -> Markup:
    return element("svg", *content, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _value_axis(y: Axis, x: Axis) -> Markup:
    return join(
        join(
            [
                element("line", class_="grid", x1=x.start, x2=x.end, y1=y.at(tick), y2=y.at(tick)),
                element("text", y.name(tick), class_="tick", x=x.start - 8, y=y.at(tick) + 4, text_anchor="end"),
            ]
        )
        for tick in y.ticks
    )


def _step_axis(x: Axis, y: Axis) -> Markup:
    ticks = [
        element("text", x.name(tick), class_="tick", x=x.at(tick), y=y.start + 16, text_anchor="middle")
        for tick in x.ticks
    ]
    return join([*ticks, element("text", "step", class_="unit", x=x.end, y=y.start + 31, text_anchor="end")])


def _limit(limit: float, x: Axis, y: Axis) -> Markup:
    return element("line", class_="limit", x1=x.start, x2=x.end, y1=y.at(limit), y2=y.at(limit))


def _curve(line: Line, x: Axis, y: Axis) -> Markup:
    places = [(x.at(point.step), y.at(point.value)) for point in line.points]
    path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in places)
    dots = places if line.has_dots or len(places) == 1 else []
    return join(
        [
            element("path", class_=f"line {line.style}", d=path),
            *(element("circle", class_=f"dot {line.style}", cx=left, cy=top, r=4) for left, top in dots),
        ]
    )


def _hovers(chart: LineChart, x: Axis, y: Axis) -> list[Markup]:
    """Return a strip for each step, over the whole height of the chart, that tells all values there."""
    by_step: dict[int, list[tuple[Line, float]]] = {}
    for line in chart.lines:
        for step, value in line.points:
            by_step.setdefault(step, []).append((line, value))
    steps = sorted(by_step)
    steps = steps[:: max(1, math.ceil(len(steps) * HOVER_PIXELS / (x.end - x.start)))]
    edges = [x.start, *(x.at((a + b) / 2) for a, b in itertools.pairwise(steps)), x.end]
    return [
        _hover(step, by_step[step], chart.say, x, y, left=left, right=right)
        for step, (left, right) in zip(steps, itertools.pairwise(edges), strict=True)
    ]


def _hover(
    step: int,
    found: list[tuple[Line, float]],
    say: Callable[[float], str],
    x: Axis,
    y: Axis,
    *,
    left: float,
    right: float,
) -> Markup:
    at = x.at(step)
    values = ", ".join(f"{line.name} {say(value)}" for line, value in found)
    return element(
        "g",
        element("rect", class_="target", x=left, y=y.end, width=right - left, height=y.start - y.end),
        element("line", class_="mark", x1=at, x2=at, y1=y.start, y2=y.end),
        *(element("circle", class_=f"mark {line.style}", cx=at, cy=y.at(value), r=4) for line, value in found),
        element("title", f"step {step}: {values}"),
        class_="hover",
    )
