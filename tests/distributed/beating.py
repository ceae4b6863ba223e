"""Ranks that train, are busy alone or leave at different moments, with little patience; see test_heartbeat.

python tests/distributed/beating.py train FOLDER STEPS | busy | leave
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from pathlib import Path

import torch

from halfbyte.distributed import current_world, enter_world, join_world
from tests.train.runs import build_trainer, trained_values

SILENCE_SECONDS = 4.0
VALUES = "values.pt"


def train(folder: str, steps: str) -> None:
    """Train on from the last checkpoint, if there is one, with a process beside that prepares nothing."""
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "save_total_limit": 3}
    resumes = any(Path(folder).glob("checkpoint-*"))
    with join_world(on_cpu=True, silence_seconds=SILENCE_SECONDS) as world:
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        say(f"child {child.pid}")
        trainer = build_trainer(Path(folder), max_steps=int(steps), **options)
        trainer.train(resume_from_checkpoint=resumes or None)
        if world.is_main:
            torch.save(trained_values(trainer.model), Path(folder) / VALUES)


def busy() -> None:
    """Let one rank work alone for far longer than another may be silent."""
    with join_world(on_cpu=True, silence_seconds=SILENCE_SECONDS) as world:
        if world.rank == 1:
            time.sleep(3 * SILENCE_SECONDS)
        world.wait()
        say(f"met {threading.active_count()} threads")
    say(f"left {[thread.name for thread in threading.enumerate() if thread.name.startswith('halfbyte')]}")


def leave() -> None:
    """End at different moments without leaving, as scripts of other libraries do; rank 0 ends first."""
    enter_world(on_cpu=True, silence_seconds=SILENCE_SECONDS)
    time.sleep(2.5 * SILENCE_SECONDS * current_world().rank)
    say("done")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _, scenario, *words = sys.argv
    {"train": train, "busy": busy, "leave": leave}[scenario](*words)
