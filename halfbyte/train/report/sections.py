"""The sections of a report that are words and numbers."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from halfbyte.config import RunConfig
from halfbyte.config.describe import REQUIRED, list_options
from halfbyte.config.load import to_yaml
from halfbyte.config.output import source_name
from halfbyte.memory.plan_text import size_of
from halfbyte.train.callbacks import format_seconds
from halfbyte.train.report.curves import curve_of
from halfbyte.train.report.markup import Markup, element
from halfbyte.train.report.record import RunRecord
from halfbyte.train.samples import Sample

ARROW, DOT = "\u2192", "\u00b7"
# Said elsewhere on the page.
SHOWN_ELSEWHERE = ("model.path", "data.train", "output_dir")


def header(record: RunRecord) -> Markup:
    """Return the name of the run, what was trained on what, and when."""
    date = datetime.datetime.fromisoformat(record.summary.finished_at)
    facts = (source_name(record.config.model.path), source_name(record.config.data.train))
    when = element("time", f"{date:%d %B %Y, %H:%M} UTC", datetime=record.summary.finished_at)
    return element(
        "header",
        element("p", "halfbyte", class_="brand"),
        element("h1", record.name),
        element("p", facts[0], f" {DOT} ", facts[1], f" {DOT} ", when, class_="quiet"),
    )


def headline_section(record: RunRecord) -> Markup:
    """Return what came of it: held-out loss before and after, and the figures of the run."""
    summary = record.summary
    adapters = summary.trainable_parameters
    figures = (
        ("trained on", f"{summary.num_tokens:,}", f"tokens, {summary.num_trained_tokens:,} of them learned"),
        ("time", format_seconds(summary.train_seconds), f"{format_seconds(summary.total_seconds)} with everything"),
        (
            "speed",
            f"{summary.tokens_per_second:,.0f}",
            f"tokens/s, {summary.trained_tokens_per_second:,.0f} of them learned",
        ),
        ("peak memory", size_of(summary.peak_memory_bytes), f"on {summary.device}"),
        ("steps", f"{summary.steps:,}", f"{summary.epochs:.3g} epochs"),
        ("adapters", f"{adapters / 1e6:.3g}M", f"of {summary.total_parameters / 1e6:,.4g}M weights"),
    )
    return element("section", *_outcome(record), _figures(figures), class_="headline")


def _outcome(record: RunRecord) -> list[Markup]:
    before, after = record.summary.held_out_before, record.summary.held_out_after
    if before is None or after is None:
        losses = curve_of(record.history, "loss")
        if not losses:
            return [element("p", "No loss was measured", class_="label")]
        return [
            element("p", "Loss in training; nothing was held out", class_="label"),
            _before_after(losses[0].value, losses[-1].value),
        ]
    change = (after.loss - before.loss) / before.loss if before.loss else 0.0
    words = f"{abs(change):.1%} {'lower' if change < 0 else 'higher'}" if change else "unchanged"
    return [
        element("p", "Held-out loss, before and after", class_="label"),
        _before_after(before.loss, after.loss),
        element(
            "p",
            element("strong", words, class_="better" if change < 0 else "worse"),
            f" {DOT} perplexity {before.perplexity:.2f} {ARROW} {after.perplexity:.2f}, "
            f"over {after.num_tokens:,} tokens that it did not learn from",
            class_="outcome",
        ),
    ]


def _before_after(before: float, after: float) -> Markup:
    return element(
        "p",
        element("span", f"{before:.4f}", class_="before"),
        element("span", ARROW, class_="arrow"),
        element("span", f"{after:.4f}", class_="after"),
        class_="before-after",
    )


def _figures(figures: Iterable[tuple[str, str, str]]) -> Markup:
    items = [
        element("div", element("dt", name), element("dd", element("b", value), element("span", note)))
        for name, value, note in figures
    ]
    return element("dl", *items, class_="facts")


def answers_section(record: RunRecord) -> Markup:
    """Return held-out questions with the answers of the base and of the tuned model."""
    samples = record.summary.samples
    if not samples:
        return element("section")
    length = f"Held-out questions; answers end at {record.config.train.max_sample_tokens} tokens at the latest."
    return element(
        "section",
        element("h2", "What it says"),
        element("p", length, class_="quiet below"),
        *(_answer(sample) for sample in samples),
    )


def _answer(sample: Sample) -> Markup:
    voices = (("before", sample.before), ("after", sample.after), ("expected", sample.expected))
    return element(
        "article",
        element("h3", sample.question, dir="auto"),
        element(
            "div",
            *(
                element(
                    "div", element("p", name, class_="label"), element("p", text, dir="auto"), class_=f"voice {name}"
                )
                for name, text in voices
            ),
            class_="voices",
        ),
        class_="answer",
    )


def data_section(record: RunRecord) -> Markup:
    """Return what became of the examples."""
    data = record.data
    lines = [
        f"{data.num_examples:,} examples, {data.num_tokens:,} tokens, {data.num_trained_tokens:,} of them learned "
        f"({data.trained_share:.0%})"
    ]
    if data.cut:
        lost = sum(cut.num_lost_trained_tokens for cut in data.cut)
        lines.append(f"{len(data.cut):,} cut at {data.max_length:,} tokens; {lost:,} tokens to learn were lost")
    if data.dropped:
        lines.append(f"{len(data.dropped):,} left out: {', '.join(sorted({drop.reason for drop in data.dropped}))}")
    return element("section", element("h2", "What it read"), _list([*lines, *data.notes]))


def configuration_section(record: RunRecord) -> Markup:
    """Return what was set, and the whole configuration as YAML."""
    rows = [
        element("tr", element("th", name, scope="row"), element("td", value), element("td", f"default {default}"))
        for name, value, default in changed_options(record.config)
    ]
    set_here = [element("div", element("table", element("tbody", *rows)), class_="changed")] if rows else []
    return element(
        "section",
        element("h2", "Configuration"),
        *set_here,
        element(
            "details",
            element("summary", "all of it, as run.yaml"),
            element("pre", element("code", to_yaml(record.config)), tabindex=0),
        ),
    )


def changed_options(config: RunConfig) -> list[tuple[str, str, str]]:
    """Return name, value and default of each option that is not at its default."""
    values = dataclasses.asdict(config)
    changed = []
    for option in list_options():
        value = values[option.section][option.name] if option.section else values[option.name]
        if option.full_name not in SHOWN_ELSEWHERE and option.default is not REQUIRED and value != option.default:
            changed.append((option.full_name, _say(value), _say(option.default)))
    return changed


def notes_section(record: RunRecord) -> Markup:
    """Return what the trainer noted, and how each of several ranks fared."""
    ranks = map(str, record.summary.ranks) if len(record.summary.ranks) > 1 else ()
    return element("section", element("h2", "Notes"), _list([*record.summary.notes, *ranks]))


def machine_section(record: RunRecord) -> Markup:
    """Return where it ran, and with which versions."""
    machine = record.machine
    memory = size_of(machine.host_bytes) if machine.host_bytes else "not known"
    facts = {
        "processor": f"{machine.cpu}, {machine.num_cpus} CPUs",
        "memory": memory,
        "GPU": "; ".join(machine.gpus) or "none",
        **record.versions,
    }
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in facts.items()]
    return element("section", element("h2", "Machine and versions"), element("dl", *rows, class_="versions"))


def footer(record: RunRecord) -> Markup:
    """Return the commands that go on from here."""
    folder = shlex.quote(str(record.folder))
    merged = shlex.quote(f"{record.folder}-merged")
    commands = (
        ("talk to it", f"halfbyte chat {folder} --compare"),
        ("one plain model of it", f"halfbyte merge {folder} {merged}"),
        ("train it again", f"halfbyte train {shlex.quote(str(record.folder / 'run.yaml'))} --output FOLDER"),
    )
    rows = [element("div", element("dt", name), element("dd", element("code", words))) for name, words in commands]
    return element("footer", element("h2", "From here"), element("dl", *rows, class_="commands"))


def _list(lines: Sequence[str]) -> Markup:
    return element("ul", *(element("li", line) for line in lines), class_="lines")


def _say(value: Any) -> str:
    """Return the value of an option as a person would write it."""
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
