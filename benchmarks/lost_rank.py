"""Freeze one of three ranks in the middle of a training, and time how long the others take to end.

    python -m benchmarks.lost_rank

Real processes on the CPU, without torchrun, which would end them itself, and with the limit that runs have. A frozen
process is what a host that has lost its power looks like: its connections stay open and say nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.run import default_output, describe, write
from halfbyte.distributed.heartbeat import SILENCE_SECONDS
from tests.distributed.torchrun import start_ranks
from tests.faults.processes import OPTIONS, make_source

CPU = torch.device("cpu")
NUM_RANKS = 3
PATIENCE_SECONDS = 300


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        source = make_source(Path(name))
        words = ["-m", "halfbyte", "train", source / "model", source / "tickets.jsonl", *OPTIONS]
        words += ["--train.save_steps=1", "--train.max_steps=100000"]
        for frozen in range(NUM_RANKS):
            folder = Path(name) / f"frozen-{frozen}"
            ranks = start_ranks(NUM_RANKS, [*words, "--output", folder])
            try:
                rows.append({"frozen": frozen, **freeze(ranks, frozen, folder)})
            finally:
                for rank in ranks:
                    with suppress(ProcessLookupError):  # those that have ended
                        os.killpg(rank.pid, signal.SIGKILL)
                    rank.wait()
            print(rows[-1], flush=True)
    write({**describe(CPU), "silence_seconds": SILENCE_SECONDS, "rows": rows}, default_output("lost_rank", CPU))
    return 0


def freeze(ranks: list[subprocess.Popen[str]], frozen: int, folder: Path) -> dict[str, object]:
    """Freeze a rank once there is a checkpoint, and return the seconds after which each other one has ended."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not list(folder.glob("checkpoint-*")):
        if time.monotonic() > end or any(rank.poll() is not None for rank in ranks):
            raise RuntimeError("no checkpoint was written")
        time.sleep(0.1)
    os.kill(ranks[frozen].pid, signal.SIGSTOP)
    since = time.monotonic()
    others = {number: rank for number, rank in enumerate(ranks) if number != frozen}
    seconds: dict[str, float] = {}
    while len(seconds) < len(others):
        for number, rank in others.items():
            if rank.poll() is not None:
                seconds.setdefault(str(number), round(time.monotonic() - since, 1))
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise RuntimeError(f"ranks still run {PATIENCE_SECONDS} s after rank {frozen} was frozen")
        time.sleep(0.05)
    outputs = [rank.communicate()[0] for rank in others.values()]
    named = sum(f"another was lost. rank {frozen} on " in output for output in outputs)
    return {"ended_after_seconds": seconds, "messages_that_name_it": named}


if __name__ == "__main__":
    raise SystemExit(main())
