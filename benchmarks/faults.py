"""Kill trainings with SIGKILL at random moments, many times, and prove that each ends as if nothing had happened.

    python -m benchmarks.faults --kills 200        (make faults)

A tiny model with dropout, NEFTune, 8-bit AdamW and accumulation, a checkpoint after every step: the writer is at work
nearly always. After each kill every checkpoint in the folder has to be whole, the newest no older than the last one of
which the run had said that it is saved, and the run goes on with the same command. At its end adapter, optimizer state,
held-out loss and every logged loss, gradient norm and learning rate are compared, bit for bit, with those of a run that
was left alone. Any difference ends this program with an error.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.run import default_output, describe, write
from tests.faults.processes import OPTIONS, Outcome, Training, make_source, newest_whole_step

CPU = torch.device("cpu")
WORDS = (*OPTIONS, "--train.save_steps=1")
# A kill is aimed at one of the next steps, or now and then at what comes before the first, and comes a little later.
FARTHEST_STEPS = 6
EARLY_SHARE = 0.1
LONGEST_DELAY_SECONDS = 0.2
MOST_KILLS_A_RUN = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = run_trials(Path(name), num_kills=options.kills, moments=random.Random(options.seed))
    write({**describe(CPU), **result}, options.output or default_output("faults", CPU))
    return 0


def run_trials(folder: Path, *, num_kills: int, moments: random.Random) -> dict[str, object]:
    """Kill until there were enough, and return what was counted."""
    source, started = make_source(folder), time.perf_counter()
    whole = Training(source / "model", source / "tickets.jsonl", folder / "whole", WORDS)
    whole.finish()
    reference = Outcome.of(whole.folder)
    counts: collections.Counter[str] = collections.Counter()
    killed_at: list[int] = []
    while counts["kills"] < num_kills:
        counts["runs"] += 1
        run = Training(whole.model, whole.data, folder / f"run-{counts['runs']}", WORDS)
        for _ in range(min(MOST_KILLS_A_RUN, num_kills - counts["kills"])):
            if not kill_once(run, moments, counts):
                break
            killed_at.append(newest_whole_step(run.folder))
        if not (run.folder / "summary.json").exists():
            run.finish()
        Outcome.of(run.folder).assert_equal(reference)
        print(f"{counts['kills']} kills, {counts['runs']} runs, all equal", file=sys.stderr)
    return {
        **counts,
        "runs_that_ended_as_the_one_left_alone": counts["runs"],
        "steps_a_run": reference.log[-1]["step"],
        "kills_by_newest_checkpoint": dict(sorted(collections.Counter(killed_at).items())),
        "seconds": round(time.perf_counter() - started),
    }


def kill_once(run: Training, moments: random.Random, counts: collections.Counter[str]) -> bool:
    """Start a run and kill it, count how it was found, and say whether it was not at its end before."""
    newest = newest_whole_step(run.folder) if run.folder.exists() else 0
    child = run.start()
    if moments.random() < EARLY_SHARE:
        child.wait_for("writing to")
    else:
        aim = newest + moments.randint(1, FARTHEST_STEPS)
        child.wait_until(lambda: child.last_step >= aim)
    time.sleep(moments.uniform(0.0, LONGEST_DELAY_SECONDS))
    if child.process.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        assert (run.folder / "summary.json").exists(), child.text
        counts["too_late"] += 1
        return False
    counts["kills"] += 1
    leftovers = [path.name for path in run.folder.glob(".checkpoint-*.tmp")]
    counts["kills_while_writing"] += any(".new." in name for name in leftovers)
    counts["kills_while_deleting"] += any(".old." in name for name in leftovers)
    counts["kills_before_the_first_checkpoint"] += newest_whole_step(run.folder) == 0
    assert newest_whole_step(run.folder) >= child.saved_step, child.text
    return True


if __name__ == "__main__":
    raise SystemExit(main())
