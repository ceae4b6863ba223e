"""A rank that vanishes without a word ends the others soon; one that is busy or has left does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from halfbyte.distributed import WorldError
from halfbyte.distributed.heartbeat import BEATS, SILENCE_SECONDS, Silences
from tests.distributed.beating import SILENCE_SECONDS as LITTLE
from tests.distributed.beating import VALUES
from tests.distributed.test_misfortunes import wait_for
from tests.distributed.torchrun import REPOSITORY, start_ranks, start_torchrun
from tests.train.runs import assert_same_values

PROGRAM = REPOSITORY / "tests" / "distributed" / "beating.py"
# Beats until it is noticed, told and heard; half as much again since these machines are busy.
TOLD_SECONDS = 1.5 * LITTLE * (1 + 8 / BEATS) + 2


@contextmanager
def ranks_of(count: int, *words: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Start ranks without torchrun, and let none stay behind."""
    ranks = start_ranks(count, [PROGRAM, *words])
    try:
        yield ranks
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.communicate()


def outputs_of(ranks: Sequence[subprocess.Popen[str]], *, seconds: float = 120) -> list[str]:
    return [rank.communicate(timeout=seconds)[0] for rank in ranks]


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_rank_ends_the_others_and_the_run_goes_on(tmp_path: Path, frozen: int) -> None:
    folder = tmp_path / "frozen"
    with ranks_of(3, "train", folder, 5000) as ranks:
        wait_for(lambda: (folder / "checkpoint-4").exists())
        os.kill(ranks[frozen].pid, signal.SIGSTOP)
        since = time.monotonic()
        others = [rank for rank in ranks if rank is not ranks[frozen]]
        outputs = outputs_of(others, seconds=60)
        assert time.monotonic() - since < TOLD_SECONDS
        assert ranks[frozen].poll() is None
        for rank, output in zip(others, outputs, strict=True):
            assert rank.returncode == WorldError.exit_code, output
            (line,) = (line for line in output.splitlines() if line.startswith("halfbyte: error: "))
            assert (
                f"rank {ranks.index(rank)} of 3 ends, since another was lost. rank {frozen} on {os.uname().nodename}: "
                in line
            )
            assert re.search(r" since \d\d:\d\d:\d\d, \d+ s ago\. ", line)
            assert line.endswith("Checkpoints are whole: start all ranks again to go on from the last one")
            (child,) = re.findall(r"child (\d+)", output)
            assert not is_alive(int(child))
    if frozen != 1:
        return
    last = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    for name in ("frozen", "whole"):
        with ranks_of(3, "train", tmp_path / name, last + 3) as ranks:
            outputs = outputs_of(ranks)
            assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
            assert not any("halfbyte: error" in output for output in outputs)
    ours, theirs = (torch.load(tmp_path / name / VALUES, weights_only=True) for name in ("frozen", "whole"))
    assert_same_values(ours, theirs)


def test_a_frozen_rank_ends_what_torchrun_started(tmp_path: Path) -> None:
    with start_torchrun(2, [PROGRAM, "train", tmp_path, 5000]) as process:
        wait_for(lambda: (tmp_path / "checkpoint-4").exists())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = max(map(int, children))
        os.kill(victim, signal.SIGSTOP)
        # Its agent waits half a minute for the frozen one before it kills it.
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(re.findall(r"ends, since another was lost\. rank \d on", output)) == 1, output
    assert not is_alive(victim)


def test_a_busy_rank_is_waited_for_and_nothing_stays_after_the_end() -> None:
    with ranks_of(2, "busy") as ranks:
        for rank, output in zip(ranks, outputs_of(ranks), strict=True):
            assert rank.returncode == 0, output
            assert "met " in output
            assert "left []" in output
            assert "error" not in output


def test_ranks_that_end_early_are_not_missed() -> None:
    with ranks_of(3, "leave") as ranks:
        outputs = outputs_of(ranks)
        assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
        assert all("done" in output and "error" not in output for output in outputs)


def test_ranks_suspended_together_go_on(tmp_path: Path) -> None:
    with ranks_of(2, "train", tmp_path, 60) as ranks:
        wait_for(lambda: (tmp_path / "checkpoint-4").exists())
        for wanted in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                os.kill(rank.pid, wanted)
            time.sleep(3 * LITTLE if wanted == signal.SIGSTOP else 0)
        outputs = outputs_of(ranks)
        assert [rank.returncode for rank in ranks] == [0, 0], outputs


def test_silences_names_all_ranks_of_a_lost_host_and_no_other() -> None:
    silences = Silences(range(1, 64), limit_seconds=SILENCE_SECONDS)
    beat = SILENCE_SECONDS / BEATS
    for number in range(BEATS + 4):
        alive = dict.fromkeys(range(1, 62), f"{number} first")
        silences.add(beat, alive | {62: "0 second", 63: f"{min(number, 1)} second"})
        if number <= BEATS:
            assert silences.lost() == ""
    assert silences.lost().startswith("rank 62 on second and rank 63 on second: nothing heard since ")


def test_silences_count_neither_sleep_nor_a_silent_store_against_ranks() -> None:
    silences = Silences([1], limit_seconds=SILENCE_SECONDS)
    silences.add(1, {1: "1 host"})
    silences.add(3600, {1: "1 host"})
    assert silences.lost() == ""
    for _ in range(2 * BEATS):
        silences.add(SILENCE_SECONDS / BEATS, None)
    assert silences.store_seconds > SILENCE_SECONDS
    assert silences.lost() == ""
    silences.add(1, {1: "goodbye host"})
    for _ in range(3 * BEATS):
        silences.add(SILENCE_SECONDS / BEATS, {1: "goodbye host"})
    assert silences.has_left(1)
    assert silences.lost() == ""
    assert silences.store_seconds == 0
