"""Real trainings in processes of their own, to be killed, starved and interrupted; and what they leave, compared.

`halfbyte train` as a process takes ten seconds to import its libraries. So children are forked from a server that has
imported them: processes all the same, with their own memory and signals, in tenths of a second.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from halfbyte.train.checkpoint import find_checkpoint, list_checkpoints, step_of
from halfbyte.train.manifest import find_damage
from tests.cli.conftest import write_examples
from tests.train.tiny import build_tiny, build_tokenizer

OPTIONS = (
    "--train.num_train_epochs=3",
    "--train.learning_rate=0.01",
    "--train.per_device_train_batch_size=1",
    "--train.gradient_accumulation_steps=2",
    "--train.logging_steps=1",
    "--train.neftune_noise_alpha=5",
    "--train.num_samples=0",
    "--lora.dropout=0.1",
    "--lora.rank=4",
    "--data.max_length=64",
    "--data.held_out_fraction=0.1",
    "--model.device=cpu",
)
SPEEDS = ("tokens_per_second", "trained_tokens_per_second", "memory_gib", "eval_runtime")
_PRELOADED = ["halfbyte.cli.main", "halfbyte.cli.train", "halfbyte.train", "peft", "tests.faults.processes"]
DEADLINE_SECONDS = 240


def make_source(folder: Path) -> Path:
    """Put a tiny model and a file of examples into a folder."""
    build_tiny("llama").save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_examples(folder / "tickets.jsonl", range(40))
    return folder


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """The options of one run, and a process that trains it as often as it is started."""

    model: Path
    data: Path
    folder: Path
    options: tuple[str, ...] = ()

    def start(self, *more: str, log: Path | None = None) -> Child:
        """Start or continue it, with further words on the command line."""
        words = ["train", str(self.model), str(self.data), "--output", str(self.folder), *self.options, *more]
        return start(words, log or self.folder.with_name(f"{self.folder.name}.log"))

    def finish(self, *more: str) -> Child:
        """Train to the end."""
        child = self.start(*more)
        assert child.wait() == 0, child.text
        return child


class Child:
    """A process at work, and what it says."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.log = process, log
        self._begin = log.stat().st_size if log.exists() else 0
        process.start()
        self.pid: int = process.pid

    @property
    def text(self) -> str:
        """What this process has said."""
        return self.log.read_bytes()[self._begin :].decode() if self.log.exists() else ""

    def wait(self) -> int:
        """Wait for its end, and return its exit code; minus the number of the signal that ended it."""
        self.process.join(DEADLINE_SECONDS)
        assert self.process.exitcode is not None, f"still running: {self.text}"
        return self.process.exitcode

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until something is the case, or the process ends."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_reached() and self.process.is_alive():
            assert time.monotonic() < deadline, self.text
            time.sleep(0.002)

    def wait_for(self, words: str) -> None:
        """Wait until it says something."""
        self.wait_until(lambda: words in self.text)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end."""
        if self.process.is_alive():
            os.kill(self.pid, number)
        return self.wait()

    @property
    def last_step(self) -> int:
        """The last step whose loss it has logged; 0 for none."""
        steps = [line.split()[1].partition("/")[0] for line in self.text.splitlines() if line.startswith("step ")]
        return int(steps[-1]) if steps and steps[-1].isdigit() else 0

    @property
    def saved_step(self) -> int:
        """The last step of which it has said that it is saved; 0 for none."""
        steps = [line.rpartition("-")[2] for line in self.text.splitlines() if line.startswith("saved checkpoint-")]
        return int(steps[-1]) if steps and steps[-1].isdigit() else 0


def start(words: Sequence[str], log: Path) -> Child:
    """Run a command of halfbyte in a process of its own, its output added to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return Child(context.Process(target=_run, args=(list(words), log)), log)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run has come to."""

    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    log: list[dict[str, Any]]
    """Losses, norms and learning rates by step, without what is measured in seconds."""
    held_out_loss: float
    """At the end."""

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        last = list_checkpoints(folder)[-1]
        assert find_damage(last) is None
        state = json.loads((last / "trainer_state.json").read_text())
        log = [{key: value for key, value in entry.items() if key not in SPEEDS} for entry in state["log_history"]]
        held_out = json.loads((folder / "summary.json").read_text())["held_out_after"]
        optimizer = torch.load(last / "optimizer.pt", weights_only=True)
        return cls(load_file(folder / "adapter_model.safetensors"), optimizer, log, held_out["loss"])

    def assert_equal(self, other: Outcome) -> None:
        """Fail unless both are the same bits."""
        assert self.log == other.log
        assert self.held_out_loss == other.held_out_loss
        assert_same_tree(self.adapter, other.adapter)
        assert_same_tree(self.optimizer, other.optimizer)


def assert_same_tree(first: Any, second: Any, where: str = "") -> None:
    """Fail unless both hold the same numbers and tensors, bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            assert_same_tree(value, second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same_tree(a, b, f"{where}/{number}")
    else:
        assert first == second, where


def newest_whole_step(folder: Path) -> int:
    """Return the step of the newest checkpoint that is whole, 0 for none; every checkpoint has to be."""
    told: list[str] = []
    found = find_checkpoint(folder, told.append)
    assert told == []
    return 0 if found is None else step_of(found)


def _run(words: list[str], log: Path) -> None:
    from halfbyte.cli.main import main

    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # Sums of several threads are added in another order, and these runs are compared bit for bit with commands that are
    # started with one thread.
    torch.set_num_threads(1)
    raise SystemExit(main(words))
