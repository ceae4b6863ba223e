"""Training with DoRA adapters: the note, the groups, checkpoints, and a whole run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from halfbyte.nn import iter_trainable
from halfbyte.train.groups import parameter_groups
from tests.train.runs import SPEC, assert_same_values, build_model, build_trainer, logged, trained_values

DORA = dataclasses.replace(SPEC, dora=True)


def test_trainer_says_that_dora_is_not_fused_and_learns(tmp_path: Path) -> None:
    model = build_model(spec=DORA)
    before = trained_values(model)
    trainer = build_trainer(tmp_path, model=model, spec=DORA, max_steps=6)
    assert any("magnitudes (DoRA)" in note for note in trainer.notes)
    trainer.train()
    assert logged(trainer)[-1][1] < logged(trainer)[0][1]
    after = trained_values(model)
    assert not [name for name, value in before.items() if after[name].equal(value)]


def test_dora_magnitudes_do_not_decay_and_learn_as_fast_as_lora_A() -> None:
    model = build_model(spec=DORA)
    groups = parameter_groups(model, lr=1e-3, loraplus_lr_ratio=16.0)
    names = {id(parameter): name for name, parameter in iter_trainable(model)}
    by_group = [{names[id(p)].rpartition(".")[2] for p in group["params"]} for group in groups]
    assert by_group == [{"lora_A"}, {"lora_B"}, {"lora_magnitude_vector"}]
    assert groups[2]["weight_decay"] == 0.0
    assert "lr" not in groups[2]


def test_resumed_dora_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "optim": "paged_adamw_8bit"}
    whole = build_trainer(tmp_path / "whole", spec=DORA, **options)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

    build_trainer(tmp_path / "cut", spec=DORA, callbacks=[Stop()], **options).train()
    resumed = build_trainer(tmp_path / "cut", spec=DORA, **options)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert_same_values(trained_values(whole.model), trained_values(resumed.model))


def test_checkpointing_changes_no_dora_gradient(tmp_path: Path) -> None:
    values = []
    for name, again in (("a", False), ("b", True)):
        model = build_model(spec=DORA)
        build_trainer(tmp_path / name, model=model, spec=DORA, max_steps=1, gradient_checkpointing=again).train()
        values.append(trained_values(model))
    assert_same_values(*values)
