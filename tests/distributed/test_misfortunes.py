"""What goes wrong among ranks is named, ends all of them, and costs only the steps since the last checkpoint."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from halfbyte.distributed import WorldError, joining
from tests.cli.conftest import write_examples
from tests.distributed.test_ranks import RELATIVE
from tests.distributed.torchrun import REPOSITORY, free_port, start_torchrun, torchrun
from tests.train.tiny import build_tiny, build_tokenizer

PROGRAM = REPOSITORY / "tests" / "distributed" / "misfortunes.py"


def test_ranks_that_do_not_fit_together_or_meet_a_nan_stop_together() -> None:
    done = torchrun(2, [PROGRAM])
    assert done.code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("with_")]
    assert len(lines) == 6, done.output
    for rank in (0, 1):
        told = {line.partition(" ")[0]: line for line in lines if f"rank {rank} " in line}
        assert "WorldError" in told["with_other_data"]
        assert "ranks differ in data" in told["with_other_data"]
        assert "ranks differ in seed: rank 0 has 0, rank 1 has 1" in told["with_other_seed"]
        # Both name the examples of the rank that met it, and the first keeps the adapter.
        assert "DivergedError" in told["with_a_poisoned_rank"]
        assert "step 1: the loss is nan. The batch holds examples.jsonl:" in told["with_a_poisoned_rank"]
        assert ("adapter_model.safetensors" in told["with_a_poisoned_rank"]) == (rank == 0)
    named = {line.partition("The batch holds")[2] for line in lines if "poisoned" in line}
    assert len({text.partition(". ")[0] for text in named}) == 1


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    words, folder = words_of_a_run(tmp_path), tmp_path / "killed"
    # One rank takes in four turns what two take in two.
    turns = "--train.gradient_accumulation_steps"
    with start_torchrun(2, [*words, f"{turns}=2", "--train.max_steps=400", "--output", folder]) as process:
        wait_for(lambda: (folder / "checkpoint-4").exists())
        victim = max(children_of(process.pid))
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "lost another rank" in output or f"pid: {victim}" in output.replace("(pid ", "pid: ")
    before = {path.name for path in folder.glob("checkpoint-*")}
    assert before
    # On one rank instead of two, which is exact: its steps hold the same micro-batches.
    last = max(int(name.partition("-")[2]) for name in before)
    words += [f"{turns}=4", f"--train.max_steps={last + 4}"]
    done = torchrun(1, [*words, "--output", folder, "--resume"])
    assert done.code == 0, done.output
    whole = torchrun(1, [*words, "--output", tmp_path / "whole"])
    assert whole.code == 0, whole.output
    assert_equal_adapters(folder, tmp_path / "whole")


def test_torchrun_starts_ranks_again_and_they_go_on(tmp_path: Path) -> None:
    words = words_of_a_run(tmp_path)
    folder, length = tmp_path / "again", "--train.max_steps=30"
    started = [*words, "--train.gradient_accumulation_steps=2", length, "--output", folder]
    with start_torchrun(2, started, options=["--max-restarts=1"]) as process:
        wait_for(lambda: (folder / "checkpoint-4").exists())
        os.kill(max(children_of(process.pid)), signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "going on after step" in output
    whole = torchrun(1, [*words, "--train.gradient_accumulation_steps=4", length, "--output", tmp_path / "whole"])
    assert whole.code == 0, whole.output
    assert_equal_adapters(folder, tmp_path / "whole")


def test_ranks_that_are_told_to_stop_do_so_after_the_same_step(tmp_path: Path) -> None:
    words, folder = words_of_a_run(tmp_path), tmp_path / "stopped"
    turns, length = "--train.gradient_accumulation_steps=2", "--train.max_steps=400"
    with start_torchrun(2, [*words, turns, length, "--output", folder]) as process:
        wait_for(lambda: (folder / "checkpoint-4").exists())
        process.terminate()
        output, _ = process.communicate(timeout=90)
    said = re.findall(r"stopped by SIGTERM after step (\d+)", output)
    assert len(said) == 2, output
    assert said[0] == said[1]
    assert (folder / f"checkpoint-{said[0]}").exists()


def test_an_environment_that_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorldError, match="rank 5 of 2"):
        joining.enter_world(on_cpu=True)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(WorldError, match="torchrun --nproc-per-node=N"):
        joining.enter_world(on_cpu=True)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        values = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(WorldError, match="Is the port in use by another"):
            joining.enter_world(on_cpu=True)


def words_of_a_run(folder: Path) -> list[object]:
    """Return a command that trains a tiny model, without its output folder and what differs between ranks."""
    model = folder / "tiny"
    build_tiny("llama").save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    data = write_examples(folder / "tickets.jsonl", range(24))
    options = ["--data.max_length=32", "--train.per_device_train_batch_size=2"]
    options += ["--train.save_steps=2", "--train.num_samples=0", "--data.held_out_fraction=0", "--model.device=cpu"]
    # A schedule that does not depend on how many steps there will be, and moments that do not round to 8 bits: there a
    # last bit more or less can become a whole code.
    options += ["--train.lr_scheduler_type=constant", "--train.warmup_ratio=0", "--train.optim=adamw_torch"]
    return ["-m", "halfbyte", "train", model, data, *options]


def assert_equal_adapters(one: Path, other: Path) -> None:
    """Fail unless two runs have trained the same, but for sums in another order.

    RELATIVE is what ten steps make of it, see test_ranks; these have up to forty.
    """
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 4 * RELATIVE * value.norm(), name


def wait_for(condition: object, *, seconds: float = 120) -> None:
    """Wait until a condition holds."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
