"""A resumed run is the uninterrupted one, bit for bit: losses, norms, adapter, optimizer state."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from halfbyte.errors import ConfigError, FormatError
from halfbyte.train import HalfbyteTrainer
from halfbyte.train.checkpoint import RUN_STATE_FILE, list_checkpoints
from halfbyte.train.manifest import MANIFEST_FILE, write_manifest
from halfbyte.train.random_state import read_random_state
from tests.faults.processes import assert_same_tree
from tests.train.runs import (
    ROW_TOKENS,
    SPEC,
    assert_same_values,
    build_examples,
    build_model,
    build_trainer,
    logged,
    trained_values,
)

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SAVED, CUT, LAST = 3, 5, 6
OPTIONS: dict[str, Any] = {
    "max_steps": LAST,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3,
    "neftune_noise_alpha": 5.0,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "loraplus_lr_ratio": 4.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"row_tokens": None},
    "grouped": {"row_tokens": None, "group_by_length": True, "optim": "adamw_torch"},
    "dora": {"spec": dataclasses.replace(SPEC, dora=True)},
    "paged": {"optim": "paged_adamw_8bit"},
    "paged 32": {"optim": "paged_adamw_32bit"},
    "workers before": {"cut": {"dataloader_num_workers": 2}},
    "workers after": {"row_tokens": None, "resumed": {"dataloader_num_workers": 2}},
    "saved rarely before": {"cut": {"save_steps": SAVED, "logging_steps": SAVED}, "resumed": {"save_steps": 50}},
}


class PowerCut(Exception):
    """What ends a run in the middle of an accumulation."""


class Cut(TrainerCallback):
    """Ends a run between two micro-batches of a step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == CUT - 1:
            raise PowerCut


def build(folder: Path, *, device: str = "cpu", **options: Any) -> HalfbyteTrainer:
    """Return a trainer, on a GPU in bf16."""
    if device == "cpu":
        return build_trainer(folder, **options)
    module: torch.nn.Module = build_model(spec=options.get("spec", SPEC)).cuda().to(torch.bfloat16)
    assert isinstance(module, PreTrainedModel)
    return build_trainer(folder, model=module, use_cpu=False, **options)


def assert_same_run(first: HalfbyteTrainer, second: HalfbyteTrainer, *, after: int = 0) -> None:
    """Fail unless both came to the same, and logged the same after some steps."""
    for name in ("loss", "grad_norm", "learning_rate"):
        logs = [[pair for pair in logged(trainer, name) if pair[0] > after] for trainer in (first, second)]
        assert logs[0] == logs[1]
    assert_same_values(trained_values(first.model), trained_values(second.model))
    assert_same_tree(first.optimizer.state_dict(), second.optimizer.state_dict())
    assert first.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", KINDS)
def test_run_cut_within_an_accumulation_resumes_bit_for_bit(tmp_path: Path, kind: str, device: str) -> None:
    options = {**OPTIONS, **KINDS[kind], "device": device}
    cut_options, resumed_options = options.pop("cut", {}), options.pop("resumed", {})
    whole = build(tmp_path / "whole", **options)
    whole.train()
    state = read_random_state(whole.model_device)
    cut = build(tmp_path / "cut", callbacks=[Cut()], **{**options, **cut_options})
    with pytest.raises(PowerCut):
        cut.train()
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == [f"checkpoint-{SAVED}"]
    resumed = build(tmp_path / "cut", **{**options, **resumed_options})
    torch.rand(7)
    resumed.train(resume_from_checkpoint=True)
    # What was logged less often until the cut is the mean of more steps.
    assert_same_run(whole, resumed, after=SAVED if "logging_steps" in cut_options else 0)
    assert_same_tree(state, read_random_state(whole.model_device))


def test_resuming_from_the_last_step_takes_no_other(tmp_path: Path) -> None:
    whole = build_trainer(tmp_path, **OPTIONS)
    whole.train()
    again = build_trainer(tmp_path, **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == LAST
    assert_same_run(whole, again)


def test_resuming_with_another_number_of_threads_is_said(tmp_path: Path) -> None:
    options = {**OPTIONS, "optim": "adamw_torch"}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(PowerCut):
            build_trainer(tmp_path, callbacks=[Cut()], **options).train()
        torch.set_num_threads(1)
        resumed = build_trainer(tmp_path, **options)
        with pytest.warns(UserWarning, match=r"not bit for bit: 2 threads then, 1 now.*; OMP_NUM_THREADS=2 makes it"):
            resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == LAST
        assert sum("not bit for bit" in note for note in resumed.notes) == 1
        # Of a checkpoint that does not know, nothing is said; a warning would end this test.
        for number, folder in enumerate(list_checkpoints(tmp_path)):
            state = json.loads((folder / RUN_STATE_FILE).read_text())
            assert state.pop("cpu_threads") == 2 - number
            (folder / RUN_STATE_FILE).write_text(json.dumps(state))
            (folder / MANIFEST_FILE).unlink()
            write_manifest(folder)
        build_trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)


def test_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_trainer(tmp_path / "whole", **OPTIONS)
    whole.train()
    # Back by a day at each look, as if somebody kept setting it.
    now, days = time.time(), itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now - 86400.0 * next(days))
        cut = build_trainer(tmp_path / "cut", callbacks=[Cut()], **{**OPTIONS, "save_steps": 1, "save_total_limit": 2})
        with pytest.raises(PowerCut):
            cut.train()
        for path in list_checkpoints(tmp_path / "cut"):
            os.utime(path, (now - 86400.0 * next(days),) * 2)
        assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-3", "checkpoint-4"]
        resumed = build_trainer(tmp_path / "cut", **OPTIONS)
        resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


def test_checkpoint_with_the_lowest_held_out_loss_is_kept(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path,
        max_steps=6,
        learning_rate=1.0,
        eval_dataset=build_examples(4, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
    )
    trainer.train()
    losses = {step: loss for step, loss in logged(trainer, "eval_loss") if step % 2 == 0}
    best = min(losses, key=lambda step: losses[step])
    assert best != LAST
    assert {path.name for path in list_checkpoints(tmp_path)} == {f"checkpoint-{best}", f"checkpoint-{LAST}"}


def test_callback_that_wants_a_checkpoint_finds_it(tmp_path: Path) -> None:
    class Upload(TrainerCallback):
        found: list[bool] = []  # noqa: RUF012

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found.append((tmp_path / f"checkpoint-{state.global_step}" / "manifest.json").exists())

    build_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, callbacks=[Upload()]).train()
    assert Upload.found == [True, True, True]


def test_resume_refuses_damage_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint to go on from"):
        build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-2" / "random.pt").write_bytes(b"")
    with pytest.raises(FormatError, match=r"checkpoint-2 is damaged: random.pt has 0 bytes"):
        build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ConfigError, match="another learning_rate"):
        build_trainer(tmp_path, learning_rate=0.5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged"):
        build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_a_checkpoint_loads_as_an_adapter(tmp_path: Path) -> None:
    from halfbyte.models import load_adapter
    from halfbyte.nn import quantize_linears_
    from halfbyte.quant import QuantSpec
    from tests.train.tiny import build_tiny

    trainer = build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, row_tokens=ROW_TOKENS)
    trainer.train()
    fresh = build_tiny("llama")
    quantize_linears_(fresh, QuantSpec())
    load_adapter(fresh, tmp_path / "checkpoint-2", trainable=True)
    assert_same_values(trained_values(trainer.model), trained_values(fresh))
