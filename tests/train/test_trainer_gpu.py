"""The trainer on a GPU: what differs there is what is late, pinned, scaled or never waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from halfbyte.nn import iter_trainable
from halfbyte.train import DivergedError
from tests.oracles import assert_close
from tests.train.runs import (
    NO_DROPOUT,
    ROW_TOKENS,
    assert_same_values,
    build_examples,
    build_model,
    build_trainer,
    logged,
    trained_values,
)

pytestmark = pytest.mark.gpu


def build_gpu_model(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    module: torch.nn.Module = build_model().cuda()
    module.to(dtype)
    assert isinstance(module, PreTrainedModel)
    return module


def build(folder: Path, *, model: PreTrainedModel | None = None, **options: Any) -> Any:
    return build_trainer(folder, model=model or build_gpu_model(), use_cpu=False, **options)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("row_tokens", [ROW_TOKENS, None])
def test_training_does_not_wait_for_the_device(tmp_path: Path, row_tokens: int | None) -> None:
    class NoWaiting(TrainerCallback):
        """From the second step on: the first makes state and chooses kernels."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 1:
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer = build(
        tmp_path,
        max_steps=4,
        gradient_accumulation_steps=2,
        optim="paged_adamw_8bit",
        logging_steps=4,
        row_tokens=row_tokens,
        callbacks=[NoWaiting()],
    )
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adamw_torch"])
def test_training_on_gpu_follows_the_cpu(tmp_path: Path, optim: str) -> None:
    on_cpu = build_trainer(tmp_path / "cpu", max_steps=4, optim=optim, model=build_model(spec=NO_DROPOUT))
    on_cpu.train()
    model = build_model(spec=NO_DROPOUT).cuda()
    on_gpu = build(tmp_path / "gpu", max_steps=4, optim=optim, model=model)
    on_gpu.train()
    losses = [torch.tensor([loss for _, loss in logged(trainer)]) for trainer in (on_cpu, on_gpu)]
    # TF32 is off, so both compute in fp32; an 8-bit state may round to the other neighbour now and then.
    assert_close("losses", *losses, dtype=torch.float32, roundings=2**12)


def test_resumed_run_on_gpu_equals_uninterrupted_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "paged_adamw_8bit"}
    whole = build(tmp_path / "whole", **options)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    build(tmp_path / "cut", callbacks=[Stop()], **options).train()
    resumed = build(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert_same_values(trained_values(whole.model), trained_values(resumed.model))


def test_bad_batch_on_gpu_changes_nothing_and_is_named(tmp_path: Path) -> None:
    model = build_gpu_model()
    trainer = build(tmp_path, model=model, max_steps=8)
    good: dict[str, torch.Tensor] = {}

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                good.update(trained_values(model))
                model.get_input_embeddings().weight.data[:] = torch.nan

    trainer.add_callback(Break())
    with pytest.raises(DivergedError, match=r"step 4: the loss is nan\. The batch holds examples.jsonl:\d+"):
        trainer.train()
    assert_same_values(good, trained_values(model))


def test_fp16_trains_with_a_loss_scale(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        model=build_gpu_model(torch.float16),
        fp16=True,
        num_train_epochs=8,
        examples=build_examples(8),
        save_strategy="epoch",
    )
    trainer.train()
    losses = [loss for _, loss in logged(trainer)]
    assert losses[-1] < losses[0] - 0.3
    assert trainer.scaler is not None
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "scaler.pt").exists()
    assert all(parameter.dtype == torch.float32 for _, parameter in iter_trainable(trainer.model))


def test_checkpointing_on_gpu_changes_no_loss(tmp_path: Path) -> None:
    runs = []
    for on in (False, True, "offload"):
        trainer = build(tmp_path / str(on), max_steps=3, gradient_checkpointing=on)
        trainer.train()
        runs.append(logged(trainer))
    assert runs[0] == runs[1] == runs[2]
