"""The doctor: it finds what there is, trains a real step, and reports a step that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.cli import diagnosis, trial_step
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


def test_doctor_trains_a_step_and_says_what_there_is(halfbyte: Run) -> None:
    done = halfbyte("doctor")
    assert (done.code, done.err) == (0, "")
    for words in ("processor", "CPU features", "GiB free", f"torch         {torch.__version__}", "works, on c", "loss"):
        assert words in done.out
    assert done.out.rstrip().endswith("For a bug report, paste all of the above.")
    assert str(Path.home()) not in done.out or len(str(Path.home())) == 1


def test_doctor_as_json(halfbyte: Run) -> None:
    record = json.loads(halfbyte("doctor", "--json").out)
    assert record["step"]["works"]
    assert record["versions"]["torch"] == torch.__version__
    assert {one["name"] for one in record["abilities"]} >= {"training on a GPU", "bf16 on the CPU", "GGUF models"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('the compiler is missing')", "exit code 1"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
    ],
)
def test_doctor_reports_a_step_that_fails(
    halfbyte: Run, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    monkeypatch.setattr(trial_step, "COMMAND", (sys.executable, "-c", code))
    done = halfbyte("doctor")
    assert done.code == 1
    assert f"FAILS, {words}" in done.out
    assert ("RuntimeError: the compiler is missing" in done.out) == ("compiler" in code)
    assert "halfbyte does not train on this machine" in done.out


def test_doctor_says_when_a_step_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_step, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(trial_step, "TIMEOUT_SECONDS", 1)
    step = trial_step.try_step()
    assert (step.works, step.text) == (False, "no end after 1 seconds")


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "installed_version", lambda package: None)
    monkeypatch.setattr(diagnosis, "cpu_has_fast_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = {one.name: one.text for one in diagnosis.examine().abilities if not one.works}
    assert missing["GGUF models"] == "gguf is not installed: pip install 'halfbyte[gguf]'"
    assert "pyarrow is not installed" in missing["Parquet files"]
    assert "bf16 on the CPU" in missing
    assert "training on a GPU" in missing
