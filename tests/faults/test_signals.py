"""Runs that are killed, terminated and interrupted end as the run that nothing happens to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.conftest import Make
from tests.faults.processes import Outcome, newest_whole_step

KILLS = 10


def test_killed_at_random_moments_loses_nothing_that_was_saved(make: Make, reference: Outcome) -> None:
    """A checkpoint a step: the writer is at work, or deleting, nearly always."""
    moments = random.Random(0)
    run, kills = make(), 0
    while kills < KILLS:
        aim = moments.randint(1, 6) + (newest_whole_step(run.folder) if run.folder.exists() else 0)
        child = run.start()
        child.wait_until(lambda child=child, aim=aim: child.last_step >= aim)  # type: ignore[misc]
        time.sleep(moments.uniform(0.0, 0.2))
        assert child.kill() in (-signal.SIGKILL, 0)
        assert newest_whole_step(run.folder) >= child.saved_step
        if (run.folder / "summary.json").exists():
            Outcome.of(run.folder).assert_equal(reference)
            run = make(folder=f"out{kills}")
        else:
            kills += 1
    child = run.start()
    assert child.wait() == 0, child.text
    Outcome.of(run.folder).assert_equal(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(make: Make, reference: Outcome, number: signal.Signals) -> None:
    # One checkpoint an epoch, so that what the signal saves is seen.
    run = make(save_steps=None)
    child = run.start()
    child.wait_for("step 2/")
    assert child.kill(number) == 128 + number
    step = newest_whole_step(run.folder)
    assert step >= 2
    last = child.text.splitlines()[-1]
    assert last.startswith(f"halfbyte: stopped by {number.name} after step {step}; all that was done is in ")
    assert f"checkpoint-{step}. Go on with the same command, or halfbyte train {run.folder / 'run.yaml'}" in last
    assert "Traceback" not in child.text
    assert not (run.folder / "summary.json").exists()
    child = run.finish()
    assert f"going on after step {step}, from {run.folder / f'checkpoint-{step}'}" in child.text
    Outcome.of(run.folder).assert_equal(reference)


def test_command_line_process_goes_on_after_a_kill(make: Make, reference: Outcome) -> None:
    """The very command, as a person starts it."""
    run = make()
    words = [sys.executable, "-m", "halfbyte", "train", str(run.model), str(run.data), "--output", str(run.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*words, *run.options], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("saved checkpoint-3"):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert newest_whole_step(run.folder) >= 3
    again = subprocess.run([*words, *run.options], capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stderr
    Outcome.of(run.folder).assert_equal(reference)
