"""The figures of a report: which curves are drawn, with which words around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from halfbyte.memory.plan_text import size_of
from halfbyte.train.report.axis import short_number
from halfbyte.train.report.charts import Line, LineChart, draw_histogram, draw_lines, draw_parts
from halfbyte.train.report.curves import Point, curve_of, smooth
from halfbyte.train.report.markup import Markup, element, join
from halfbyte.train.report.record import Part, RunRecord

GIB = 2**30
# Below this width the page is a phone's; page.css says the same.
WIDE, NARROW = (1080, 320), (330, 230)
SMALL = (340, 190)
# Those beside a legend as tall as this.
TALL = (340, 262)
NAMED_PARTS = 6


class Key(NamedTuple):
    """An entry of a legend."""

    name: str
    style: str


def curves_section(record: RunRecord) -> Markup:
    """Return all figures: loss across the page, the others below it in columns."""
    small = [
        _learning_rate(record),
        _gradient_norm(record),
        _speed(record),
        _memory_by_step(record),
        _memory_by_purpose(record),
        _lengths(record),
    ]
    figures = [figure for figure in small if figure is not None]
    return element("section", element("h2", "How it went"), _loss(record), element("div", *figures, class_="figures"))


def held_out_points(record: RunRecord) -> tuple[Point, ...]:
    """Return the held-out loss of the base at step 0, of every evaluation, and of the adapter that is kept."""
    points = {point.step: point for point in curve_of(record.history, "eval_loss")}
    summary = record.summary
    if summary.held_out_before is not None:
        points[0] = Point(0, summary.held_out_before.loss)
    if summary.held_out_after is not None and summary.steps not in points:
        points[summary.steps] = Point(summary.steps, summary.held_out_after.loss)
    return tuple(points[step] for step in sorted(points))


def _loss(record: RunRecord) -> Markup:
    raw = curve_of(record.history, "loss")
    held_out = held_out_points(record)
    lines = (
        Line(name="train", points=raw, style="raw"),
        Line(name="smoothed", points=smooth(raw), style="train"),
        Line(name="held-out", points=held_out, style="held-out", has_dots=True),
    )
    if not raw and not held_out:
        return element("p", "No loss was logged.", class_="quiet")
    chart = LineChart(lines=lines, say=lambda value: f"{value:.4f}")
    keys = [Key("train, as logged", "raw"), Key("train, smoothed", "train")]
    if held_out:
        keys.append(Key("held-out", "held-out"))
    return _figure(
        "Loss",
        "nats a token",
        element("div", draw_lines(chart, "Loss", width=WIDE[0], height=WIDE[1]), class_="wide"),
        element("div", draw_lines(chart, "Loss", width=NARROW[0], height=NARROW[1]), class_="narrow"),
        keys=keys,
    )


def _learning_rate(record: RunRecord) -> Markup | None:
    points = curve_of(record.history, "learning_rate")
    line = Line(name="learning rate", points=points, style="train")
    return _small("Learning rate", "", LineChart(lines=(line,), say=short_number, from_zero=True))


def _gradient_norm(record: RunRecord) -> Markup | None:
    points = curve_of(record.history, "grad_norm")
    limit = record.config.train.max_grad_norm
    is_near = bool(points) and limit > 0 and max(point.value for point in points) > limit / 2
    chart = LineChart(
        lines=(Line(name="gradient norm", points=points, style="train"),),
        say=lambda value: f"{value:.3g}",
        from_zero=True,
        limit=limit if is_near else None,
    )
    keys = (Key(f"clipped to {limit:g}", "limit"),) if is_near else ()
    return _small("Gradient norm", "before clipping", chart, keys=keys)


def _speed(record: RunRecord) -> Markup | None:
    lines = (
        Line(name="all", points=curve_of(record.history, "tokens_per_second"), style="train"),
        Line(name="learned", points=curve_of(record.history, "trained_tokens_per_second"), style="second"),
    )
    chart = LineChart(lines=lines, say=lambda value: f"{value:,.0f} tokens/s", from_zero=True)
    return _small("Speed", "tokens/s", chart, keys=(Key("all tokens", "train"), Key("learned", "second")))


def _memory_by_step(record: RunRecord) -> Markup | None:
    planned = sum(part.num_bytes for part in record.planned)
    chart = LineChart(
        lines=(Line(name="in use", points=curve_of(record.history, "memory_gib"), style="train"),),
        say=lambda value: f"{value:.2f} GiB",
        from_zero=True,
        limit=planned / GIB if planned else None,
    )
    keys = (Key("in use", "train"), Key("planned", "limit")) if planned else ()
    return _small("Memory by step", "GiB", chart, keys=keys, size=TALL)


def _memory_by_purpose(record: RunRecord) -> Markup:
    parts = merge_small(record.planned)
    rows: list[tuple[str, list[tuple[str, float]]]] = []
    if parts:
        rows.append(("planned", [(part.purpose, part.num_bytes) for part in parts]))
    # A process' peak on a CPU is known with the files that it has mapped only, libraries above all.
    used = "used at the peak" + (", mapped files included" if record.summary.device == "cpu" else "")
    rows.append((used, [(used, record.summary.peak_memory_bytes)]))
    legend = [
        element(
            "li",
            element("span", class_=f"swatch part-{index}"),
            element("span", part.purpose),
            element("span", size_of(part.num_bytes), class_="amount"),
        )
        for index, part in enumerate(parts)
    ]
    drawn = draw_parts(rows, title="Memory planned and used", say=size_of, width=SMALL[0])
    return _figure("Memory by purpose", "", drawn, element("ul", *legend, class_="parts"))


def merge_small(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return the largest parts, and the sum of all others as one."""
    ordered = tuple(parts)
    if len(ordered) <= NAMED_PARTS:
        return ordered
    large, small = ordered[: NAMED_PARTS - 1], ordered[NAMED_PARTS - 1 :]
    return (*large, Part(f"{len(small)} smaller parts", sum(part.num_bytes for part in small)))


def _lengths(record: RunRecord) -> Markup | None:
    bins = [(f"{one.first}\u2013{one.last}", one.num_examples) for one in record.data.histogram()]
    if not bins:
        return None
    drawn = draw_histogram(
        bins, title="Lengths of examples", unit="tokens", counted="examples", width=TALL[0], height=TALL[1]
    )
    return _figure("Lengths of the data", "examples", drawn)


def _small(
    title: str, unit: str, chart: LineChart, *, keys: Iterable[Key] = (), size: tuple[int, int] = SMALL
) -> Markup | None:
    """Return a figure of a column's width, None where nothing was logged."""
    if not any(line.points for line in chart.lines):
        return None
    return _figure(title, unit, draw_lines(chart, title, width=size[0], height=size[1]), keys=keys)


def _figure(title: str, unit: str, *content: Markup, keys: Iterable[Key] = ()) -> Markup:
    legend = [element("li", element("span", class_=f"swatch {key.style}"), element("span", key.name)) for key in keys]
    caption = element(
        "figcaption",
        element("h3", title, *([element("small", unit)] if unit else [])),
        element("output", class_="readout"),
        *([element("ul", *legend, class_="legend")] if legend else []),
    )
    return element("figure", caption, join(content))
