from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.train.callbacks import ProgressLine, format_seconds
from tests.train.runs import build_examples, build_trainer


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (11220, "3:07:00")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_progress_line_writes_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    build_trainer(
        tmp_path,
        max_steps=3,
        eval_dataset=build_examples(3, seed=5),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        callbacks=[ProgressLine(Console(file=out, width=40))],
    ).train()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["1/3", "2/3", "3/3", "3/3"]
    for word in ("loss", "tokens/s", "trained)", "GiB", "lr", "left"):
        assert word in lines[0]
    assert "held-out loss" in lines[3]
    assert lines[4:] == ["saved checkpoint-3"]


def test_progress_line_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    line = ProgressLine(Console(file=out, force_terminal=True, width=120))
    build_trainer(tmp_path, max_steps=2, callbacks=[line]).train()
    assert "2/2" in out.getvalue()
    assert "tokens/s" in out.getvalue()
    assert line._progress is None


@pytest.mark.parametrize("quiet", [True, False])
def test_trainer_has_a_progress_line_unless_told_not_to(tmp_path: Path, quiet: bool) -> None:
    trainer = build_trainer(tmp_path, disable_tqdm=quiet)
    lines = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressLine)]
    assert len(lines) == (0 if quiet else 1)
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert not names & {"ProgressCallback", "PrinterCallback"}
