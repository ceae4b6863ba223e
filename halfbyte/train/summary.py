"""What a run came to: for the person at the end, and in summary.json for whoever comes later."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from halfbyte.config.output import REPORT_FILE, SUMMARY_FILE, save_text
from halfbyte.nn import AdapterReport
from halfbyte.train.callbacks import format_seconds
from halfbyte.train.evaluate import HeldOut
from halfbyte.train.meter import peak_memory_bytes
from halfbyte.train.ranks import RankReport, report_ranks
from halfbyte.train.samples import Sample, printable
from halfbyte.train.trainer import HalfbyteTrainer

SHOWN_CHARACTERS = 400


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The base model beside the tuned one."""

    before: HeldOut | None
    after: HeldOut | None
    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of a run."""

    base_model: str
    steps: int
    """Optimizer steps in all."""
    steps_now: int
    """Of them, those since the run was started or resumed; tokens and times below are theirs."""
    epochs: float
    held_out_before: HeldOut | None
    """Of the base model."""
    held_out_after: HeldOut | None
    num_tokens: int
    num_trained_tokens: int
    """Of them, those that were a target."""
    train_seconds: float
    """Without evaluations and checkpoints."""
    total_seconds: float
    tokens_per_second: float
    trained_tokens_per_second: float
    peak_memory_bytes: int
    device: str
    trainable_parameters: int
    total_parameters: int
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    ranks: tuple[RankReport, ...]
    """Of all ranks, whose tokens and speeds add up to those above; peak memory above is that of the first."""
    finished_at: str
    """Date and time in UTC, as ISO 8601 writes them."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, held-out figures with their perplexity."""
        values = dataclasses.asdict(self)
        for name in ("held_out_before", "held_out_after"):
            held_out = getattr(self, name)
            if held_out is not None:
                values[name]["perplexity"] = held_out.perplexity
        return values

    def save(self, folder: Path) -> None:
        """Write summary.json, whole or not at all."""
        save_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", folder / SUMMARY_FILE)


def make_summary(
    trainer: HalfbyteTrainer, adapters: AdapterReport, comparison: Comparison, *, seconds: float
) -> Summary:
    """Collect the figures of a trainer that has trained; all ranks must ask."""
    meter = trainer.meter
    ranks = report_ranks(trainer.world, meter)
    return Summary(
        base_model=trainer.base_model,
        steps=trainer.state.global_step,
        steps_now=meter.num_steps,
        epochs=float(trainer.state.epoch or 0.0),
        held_out_before=comparison.before,
        held_out_after=comparison.after,
        num_tokens=sum(one.num_tokens for one in ranks),
        num_trained_tokens=sum(one.num_trained_tokens for one in ranks),
        train_seconds=meter.seconds,
        total_seconds=seconds,
        tokens_per_second=sum(one.tokens_per_second for one in ranks),
        trained_tokens_per_second=sum(one.trained_tokens_per_second for one in ranks),
        peak_memory_bytes=peak_memory_bytes(trainer.model_device),
        device=str(trainer.model_device),
        trainable_parameters=adapters.trainable_parameters,
        total_parameters=adapters.total_parameters,
        samples=comparison.samples,
        notes=tuple(trainer.notes),
        ranks=tuple(ranks),
        finished_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def print_summary(console: Console, summary: Summary, folder: Path) -> None:
    """Show held-out loss and answers before and after, speed, memory, and where everything is."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    for sample in summary.samples:
        say(f"\nquestion  {_short(sample.question)}", "bold")
        say(f"expected  {_short(sample.expected)}", "dim")
        say(f"before    {_short(sample.before)}")
        say(f"after     {_short(sample.after)}", "green")
    say("")
    before, after = summary.held_out_before, summary.held_out_after
    if before is not None and after is not None:
        say(
            f"held-out loss {before.loss:.4f} -> {after.loss:.4f}, perplexity {before.perplexity:.2f} -> "
            f"{after.perplexity:.2f} ({after.num_tokens:,} tokens)",
            "bold",
        )
    say(
        f"{summary.steps_now} steps in {format_seconds(summary.train_seconds)}, "
        f"{format_seconds(summary.total_seconds)} with loading, evaluation and samples: "
        f"{summary.tokens_per_second:,.0f} tokens/s, {summary.trained_tokens_per_second:,.0f} of them trained; "
        f"peak memory {summary.peak_memory_bytes / 2**30:.2f} GiB on {summary.device}"
    )
    for one in summary.ranks if len(summary.ranks) > 1 else ():
        say(str(one))
    say(f"adapter, tokenizer, run.yaml, {SUMMARY_FILE}: {folder}")
    say(f"to look at, in a browser: {folder / REPORT_FILE}")
    if (folder / "logs").exists():
        say(f"curves: tensorboard --logdir {folder / 'logs'}")
    say(f"next:  halfbyte chat {folder} --compare")
    say(f"       halfbyte merge {folder} {folder}-merged")


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."
