"""The list of runs: what each folder tells, in which order, and folders that tell nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.load import make_config, save_run_config
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


def write_run(folder: Path, *, before: float | None = 2.0, after: float | None = 1.5, date: str = "2026-01-01") -> None:
    folder.mkdir(parents=True)
    config = make_config({"model.path": "org/base-1B", "data.train": "/data/tickets.jsonl"})
    save_run_config(config, folder)
    losses = {"held_out_before": before, "held_out_after": after}
    summary: dict[str, Any] = {name: None if loss is None else {"loss": loss} for name, loss in losses.items()}
    summary |= {"steps": 1200, "total_seconds": 3725.4, "finished_at": f"{date}T12:00:00+00:00"}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write_run(folder / "first", after=1.25, date="2026-01-01")
    write_run(folder / "second", after=1.75, date="2026-03-01")
    write_run(folder / "blind", before=None, after=None, date="2026-02-01")
    write_run(folder / "cut")
    (folder / "cut" / "summary.json").unlink()
    (folder / "cut" / "checkpoint-40").mkdir()
    (folder / "notes").mkdir()
    return folder


def names(done: Outcome) -> list[str]:
    return [line.split()[0] for line in done.out.splitlines()[1:]]


def test_runs_lists_what_each_run_tells(halfbyte: Run, runs: Path) -> None:
    done = halfbyte("runs", runs)
    assert (done.code, done.err) == (0, "")
    lines = {line.split()[0]: line for line in done.out.splitlines()}
    assert lines["name"].split() == ["name", "model", "data", "steps", "held-out", "loss", "time", "date"]
    for words in ("org/base-1B", "tickets.jsonl", "1,200", "2.0000 -> 1.2500", "1:02:05", "2026-01-01"):
        assert words in lines["first"]
    assert "nothing held out" in lines["blind"]
    assert "40  unfinished" in lines["cut"]
    assert "/data" not in done.out


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("date", ["second", "blind", "first", "cut"]),
        ("loss", ["first", "second", "blind", "cut"]),
        ("name", ["blind", "cut", "first", "second"]),
    ],
)
def test_runs_sorts(halfbyte: Run, runs: Path, order: str, expected: list[str]) -> None:
    assert names(halfbyte("runs", runs, "--sort", order)) == expected


def test_runs_as_json(halfbyte: Run, runs: Path) -> None:
    record = json.loads(halfbyte("runs", runs, "--json").out)
    assert [one["name"] for one in record] == ["second", "blind", "first", "cut"]
    assert (record[2]["held_out_before"], record[2]["held_out_after"]) == (2.0, 1.25)
    assert (record[3]["is_finished"], record[3]["steps"], record[3]["seconds"]) == (False, 40, None)
    assert record[0]["folder"] == str(runs / "second")


def test_runs_takes_the_folder_of_one_run_and_runs_by_default(
    halfbyte: Run, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(halfbyte("runs", runs / "first")) == ["first"]
    monkeypatch.chdir(runs.parent)
    assert len(names(halfbyte("runs"))) == 4
    assert halfbyte("runs", runs / "notes").out == f"no runs in {runs / 'notes'}\n"


def test_runs_says_which_it_could_not_read(halfbyte: Run, runs: Path) -> None:
    (runs / "first" / "summary.json").write_text("{")
    (runs / "second" / "run.yaml").write_text("lora: {rnk: 3}")
    (runs / "blind" / "summary.json").write_text('{"steps": 3}')
    done = halfbyte("runs", runs)
    assert done.code == 2
    assert names(done) == ["cut"]
    for words in ("summary.json cannot be read", "unknown option lora.rnk", "does not tell held_out_after"):
        assert words in done.err
    assert halfbyte("runs", runs / "absent").err.startswith(f"halfbyte: error: {runs / 'absent'}: no such folder")


def test_runs_lists_a_run_that_has_just_been_trained(
    halfbyte: Run, model_folder: Path, examples_file: Path, tmp_path: Path
) -> None:
    options = ["--train.max_steps=1", "--data.max_length=128", "--train.num_samples=0"]
    assert halfbyte("train", model_folder, examples_file, "--output", tmp_path / "runs" / "one", *options).code == 0
    (record,) = json.loads(halfbyte("runs", tmp_path / "runs", "--json").out)
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert record["held_out_after"] == summary["held_out_after"]["loss"]
    assert (record["model"], record["finished_at"]) == (str(model_folder), summary["finished_at"])
