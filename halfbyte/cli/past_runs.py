"""Runs as they lie in folders: found, read from run.yaml and summary.json, sorted, and drawn as a table."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halfbyte.cli.console import printable
from halfbyte.config.load import load_config
from halfbyte.config.output import RUN_FILE, SUMMARY_FILE, holds_run, last_checkpoint, source_name
from halfbyte.errors import ConfigError

COLUMNS = ("name", "model", "data", "steps", "held-out loss", "time", "date")
ALIGNED_RIGHT = ("steps", "time")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PastRun:
    """A run, finished or not."""

    name: str
    folder: str
    model: str
    data: str
    is_finished: bool
    steps: int
    """Of an unfinished run those of its last checkpoint."""
    held_out_before: float | None
    """Loss of the base model; None where nothing was held out, or the run has not finished."""
    held_out_after: float | None
    seconds: float | None
    """With loading and evaluation; since it was resumed."""
    finished_at: str | None
    """In UTC, as ISO 8601 writes it; None where summary.json does not tell."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


SORTINGS: dict[str, Callable[[PastRun], Any]] = {
    "date": lambda run: tuple(-ord(letter) for letter in run.finished_at or "0"),
    "loss": lambda run: math.inf if run.held_out_after is None else run.held_out_after,
    "name": lambda run: run.name,
}


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of runs directly in `folder`, or `folder` itself if it is one.

    Raises:
        ConfigError: There is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; halfbyte train makes a run, by default in runs")
    if holds_run(folder):
        return [folder]
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and (path / RUN_FILE).exists()]


def read_run(folder: Path) -> PastRun:
    """Return what a folder tells of its run.

    Raises:
        ConfigError: run.yaml or summary.json is missing what it should tell, or cannot be read.
    """
    config = load_config(folder / RUN_FILE)
    summary = _read_summary(folder / SUMMARY_FILE)
    checkpoint = last_checkpoint(folder)
    saved_steps = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
    return PastRun(
        name=folder.resolve().name,
        folder=str(folder),
        model=config.model.path,
        data=config.data.train,
        is_finished=summary is not None,
        steps=saved_steps if summary is None else summary["steps"],
        held_out_before=_loss_of(summary, "held_out_before"),
        held_out_after=_loss_of(summary, "held_out_after"),
        seconds=None if summary is None else summary["total_seconds"],
        finished_at=None if summary is None else summary.get("finished_at"),
    )


def sort_runs(runs: Sequence[PastRun], *, by: str) -> list[PastRun]:
    """Return runs in one of the orders of SORTINGS, equal ones by name."""
    return sorted(runs, key=lambda run: (SORTINGS[by](run), run.name))


def draw_table(runs: Sequence[PastRun]) -> str:
    """Return a line for each run under the names of the columns."""
    rows = [COLUMNS, *(_cells(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if name in ALIGNED_RIGHT else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(run: PastRun) -> tuple[str, ...]:
    if not run.is_finished:
        loss = "unfinished"
    elif run.held_out_before is None or run.held_out_after is None:
        loss = "nothing held out"
    else:
        loss = f"{run.held_out_before:.4f} -> {run.held_out_after:.4f}"
    return (
        printable(run.name),
        printable(source_name(run.model)),
        printable(source_name(run.data)),
        f"{run.steps:,}",
        loss,
        "-" if run.seconds is None else _duration(run.seconds),
        "-" if run.finished_at is None else _local_time(run.finished_at),
    )


def _read_summary(path: Path) -> dict[str, Any] | None:
    """Return what is in summary.json, None for a run that has not finished."""
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    missing = {"steps", "total_seconds", "held_out_before", "held_out_after"} - set(summary)
    if missing:
        raise ConfigError(f"{path} does not tell {', '.join(sorted(missing))}")
    return summary


def _loss_of(summary: dict[str, Any] | None, name: str) -> float | None:
    return None if summary is None or summary[name] is None else summary[name]["loss"]


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _local_time(finished_at: str) -> str:
    return f"{datetime.datetime.fromisoformat(finished_at).astimezone():%Y-%m-%d %H:%M}"
