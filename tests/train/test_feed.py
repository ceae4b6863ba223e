"""Processes that prepare batches die, hang, and are slow: the run is the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from halfbyte.data.examples import TokenizedExample
from halfbyte.train import HalfbyteTrainer
from tests.train.runs import ROW_TOKENS, assert_same_values, build_examples, build_trainer, logged, trained_values

OPTIONS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "dataloader_prefetch_factor": 1,
    "dataloader_num_workers": 2,
    "disable_tqdm": False,
}


class Harm(TrainerCallback):
    """Sends a signal to the workers of an epoch, all or the first, after its second step."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count, self.harmed = number, count, 0
        self.trainer: HalfbyteTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if state.global_step == 2:
            for worker in self.trainer.feed.workers[: self.count]:
                os.kill(worker.pid, self.number)
                self.harmed += 1


WITHOUT = {**OPTIONS, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None}


@pytest.mark.parametrize("row_tokens", [ROW_TOKENS, None])
@pytest.mark.parametrize("count", [1, 2])
def test_run_survives_the_death_of_its_workers(tmp_path: Path, row_tokens: int | None, count: int) -> None:
    plain = build_trainer(tmp_path / "a", row_tokens=row_tokens, **WITHOUT)
    plain.train()
    harm = Harm(signal.SIGKILL, count)
    harmed = build_trainer(tmp_path / "b", row_tokens=row_tokens, callbacks=[harm], **OPTIONS)
    harm.trainer = harmed
    harmed.train()
    assert harm.harmed == count
    assert any("processes that prepare batches have failed" in note for note in harmed.notes)
    assert logged(plain) == logged(harmed)
    assert_same_values(trained_values(plain.model), trained_values(harmed.model))


class OnBadDisk(list[TokenizedExample]):
    """Examples of which a worker never gets one."""

    def __getitem__(self, index: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None and index == 7:
            time.sleep(3600)
        return super().__getitem__(index)


def test_run_survives_a_worker_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.train.trainer.PATIENCE_SECONDS", 2)
    plain = build_trainer(tmp_path / "a", row_tokens=None, **WITHOUT)
    plain.train()
    examples = OnBadDisk(build_examples())
    hanging = build_trainer(tmp_path / "b", row_tokens=None, examples=examples, **OPTIONS)
    hanging.train()
    assert any("failed (DataLoader timed out after 2 seconds)" in note for note in hanging.notes)
    assert logged(plain) == logged(hanging)
    assert_same_values(trained_values(plain.model), trained_values(hanging.model))


def test_workers_do_not_hear_ctrl_c(tmp_path: Path) -> None:
    harm = Harm(signal.SIGINT, 2)
    trainer = build_trainer(tmp_path, callbacks=[harm], **OPTIONS)
    harm.trainer = trainer
    trainer.train()
    assert harm.harmed == 2
    assert not [note for note in trainer.notes if "failed" in note]


class Broken(list[TokenizedExample]):
    """Examples of which one cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None and index == 7:
            raise LookupError("no such example")
        return super().__getitem__(index)


def test_error_in_a_worker_is_raised(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, row_tokens=None, examples=Broken(build_examples()), **OPTIONS)
    with pytest.raises(LookupError, match="in DataLoader worker process"):
        trainer.train()
