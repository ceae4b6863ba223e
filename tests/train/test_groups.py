"""LoRA+ and NEFTune through the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from halfbyte.nn import LoraSpec, iter_trainable
from halfbyte.train import TrainerOptions
from halfbyte.train.groups import parameter_groups
from tests.train.runs import NO_DROPOUT, SPEC, build_model, build_trainer, logged, trained_values


def test_groups_hold_every_trained_parameter_once() -> None:
    model = build_model(spec=LoraSpec(rank=4, modules_to_save=("norm", "lm_head"), seed=0))
    groups = parameter_groups(model, lr=1e-3, loraplus_lr_ratio=16)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for _, p in iter_trainable(model))
    assert [group.get("lr") for group in groups] == [None, 16e-3, None]
    assert all(p.dim() < 2 for p in groups[2]["params"])
    assert len(parameter_groups(build_model(), lr=1e-3)) == 1


def first_updates(folder: Path, ratio: float) -> dict[str, float]:
    """Return how far each parameter goes in one step, in which Adam moves everything by the learning rate."""
    model = build_model(spec=NO_DROPOUT)
    trainer = build_trainer(folder, model=model, max_steps=1, lr_scheduler_type="constant", optim="adamw_torch")
    object.__setattr__(trainer, "options", TrainerOptions(row_tokens=32, lora=SPEC, loraplus_lr_ratio=ratio))
    before = trained_values(model)
    trainer.train()
    return {name: float((value - before[name]).abs().amax()) for name, value in trained_values(model).items()}


def test_lora_b_learns_faster_by_the_ratio(tmp_path: Path) -> None:
    plain, faster = first_updates(tmp_path / "a", 1.0), first_updates(tmp_path / "b", 8.0)
    for name, distance in faster.items():
        assert distance == pytest.approx(plain[name] * (8 if name.endswith("lora_B") else 1), rel=1e-3)


def test_noise_is_added_in_training_alone(tmp_path: Path) -> None:
    losses = []
    for alpha in (None, 5.0):
        trainer = build_trainer(tmp_path / str(alpha), max_steps=2, neftune_noise_alpha=alpha)
        torch.manual_seed(0)
        trainer.train()
        losses.append(logged(trainer))
        embedding = trainer.model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        assert not embedding._forward_hooks
    assert losses[0] != losses[1]
