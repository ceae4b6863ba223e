from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from halfbyte.errors import ConfigError
from halfbyte.models.generate import GenerationOptions, generate_text
from halfbyte.nn import adapters_disabled, iter_trainable
from halfbyte.train import DivergedError, HalfbyteTrainer, TrainerOptions
from halfbyte.train.arguments import HalfbyteArguments
from halfbyte.train.batches import BatchOptions, iter_batches
from halfbyte.train.checkpoint import list_checkpoints
from tests.oracles import assert_close
from tests.train.runs import (
    NO_DROPOUT,
    ROW_TOKENS,
    SPEC,
    assert_same_values,
    build_examples,
    build_model,
    build_trainer,
    logged,
    trained_values,
)
from tests.train.tiny import build_tokenizer


def gradients_of_one_step(
    folder: Path, *, batch_size: int, accumulation: int, **options: Any
) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in iter_trainable(model)})

    trainer = build_trainer(
        folder,
        model=build_model(spec=NO_DROPOUT),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        callbacks=[Keep()],
        **options,
    )
    trainer.train()
    seen["loss"] = torch.tensor(logged(trainer)[0][1])
    return seen


@pytest.mark.parametrize("row_tokens", [ROW_TOKENS, None])
def test_accumulation_1x8_equals_8x1(tmp_path: Path, row_tokens: int | None) -> None:
    whole = gradients_of_one_step(tmp_path / "a", batch_size=8, accumulation=1, row_tokens=row_tokens)
    parts = gradients_of_one_step(tmp_path / "b", batch_size=1, accumulation=8, row_tokens=row_tokens)
    for name, value in whole.items():
        assert_close(name, value, parts[name], dtype=torch.float32, roundings=64, reduction_length=8 * ROW_TOKENS)


def test_packed_gradient_equals_padded_gradient(tmp_path: Path) -> None:
    examples = build_examples(16)
    packed = gradients_of_one_step(tmp_path / "a", batch_size=16, accumulation=1, examples=examples)
    padded = gradients_of_one_step(tmp_path / "b", batch_size=16, accumulation=1, examples=examples, row_tokens=None)
    for name, value in packed.items():
        assert_close(name, value, padded[name], dtype=torch.float32, roundings=64, reduction_length=16 * ROW_TOKENS)


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    plain = gradients_of_one_step(tmp_path / "a", batch_size=2, accumulation=1)
    again = gradients_of_one_step(tmp_path / "b", batch_size=2, accumulation=1, gradient_checkpointing=True)
    assert_same_values(plain, again)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
def test_training_lowers_the_loss(tmp_path: Path, optim: str) -> None:
    trainer = build_trainer(tmp_path, optim=optim, num_train_epochs=8, examples=build_examples(8))
    trainer.train()
    losses = [loss for _, loss in logged(trainer)]
    assert losses[-1] < losses[0] - 0.3


def test_training_moves_only_adapters(tmp_path: Path) -> None:
    model = build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    build_trainer(tmp_path, model=model, max_steps=3).train()
    trained = {name for name, _ in iter_trainable(model)}
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) == (name not in trained), name


def test_training_with_evaluation_and_samples_between_equals_training_without(tmp_path: Path) -> None:
    held_out = build_examples(6, seed=5)
    plain = build_trainer(tmp_path / "a", max_steps=6)
    plain.train()
    evaluated = build_trainer(tmp_path / "b", max_steps=6, eval_dataset=held_out, eval_strategy="steps", eval_steps=1)

    class Sample(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            generate_text(model, build_tokenizer(), ["hello"], options=GenerationOptions(max_new_tokens=2))
            with adapters_disabled(model):
                generate_text(model, build_tokenizer(), ["hello"], options=GenerationOptions(max_new_tokens=2))

    evaluated.add_callback(Sample())
    evaluated.train()
    assert len(logged(evaluated, "eval_loss")) == 6
    assert logged(plain) == logged(evaluated)
    assert_same_values(trained_values(plain.model), trained_values(evaluated.model))


def test_evaluate_is_the_mean_over_tokens(tmp_path: Path) -> None:
    held_out = build_examples(7, seed=5)
    results = [
        build_trainer(tmp_path, eval_dataset=held_out, per_device_eval_batch_size=size, row_tokens=rows).evaluate()
        for size, rows in ((1, None), (3, None), (2, ROW_TOKENS))
    ]
    losses = torch.tensor([result["eval_loss"] for result in results])
    assert_close("loss", losses[:1].expand(3), losses, dtype=torch.float32, roundings=16)
    assert results[0]["eval_tokens"] == sum(example.num_trained_tokens for example in held_out)
    assert results[0]["eval_perplexity"] == pytest.approx(math.exp(results[0]["eval_loss"]))


@pytest.mark.parametrize("row_tokens", [ROW_TOKENS, None])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, stop: int, row_tokens: int | None) -> None:
    """Mid-epoch, and with a last accumulated batch of the epoch that is not full."""
    options: dict[str, Any] = {
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 3,
        "logging_steps": 4,
        "save_strategy": "steps",
        "save_steps": stop,
        "row_tokens": row_tokens,
        "eval_dataset": build_examples(4, seed=5),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "optim": "paged_adamw_8bit",
    }
    whole = build_trainer(tmp_path / "whole", **options)
    whole.train()
    assert whole.state.global_step > stop

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == stop
            return control

    build_trainer(tmp_path / "cut", callbacks=[Stop()], **options).train()
    resumed = build_trainer(tmp_path / "cut", **options)
    torch.rand(5)
    resumed.train(resume_from_checkpoint=True)

    assert logged(resumed) == logged(whole)
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    assert_same_values(trained_values(whole.model), trained_values(resumed.model))
    first, second = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert first.keys() == second.keys()
    for index, state in first.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[index][key])), (index, key)


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    other = build_trainer(tmp_path, max_steps=4, examples=build_examples(24, seed=9))
    with pytest.raises(ConfigError, match="the training examples are not those of the run"):
        other.train(resume_from_checkpoint=True)


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    build_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert not list(tmp_path.glob(".*"))


def test_training_twice_goes_on_and_clips(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, max_steps=2, max_grad_norm=1e-4, optim="adamw_torch_fused", adam_epsilon=1.0)
    trainer.train()
    before = trained_values(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    # An epsilon of 1 makes a step at most the learning rate times the clipped gradient.
    moved = max((value - before[name]).abs().max().item() for name, value in trained_values(trainer.model).items())
    assert 0 < moved < 2 * 1e-2 * 1e-4 * 1.01


def test_batches_may_come_from_other_processes(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 2):
        trainer = build_trainer(tmp_path / str(workers), num_train_epochs=2, dataloader_num_workers=workers)
        trainer.train()
        runs.append(logged(trainer))
    assert runs[0] == runs[1]


def test_load_best_model_at_end_brings_back_the_best(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path,
        max_steps=4,
        learning_rate=1.0,
        eval_dataset=build_examples(4, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = min(loss for _, loss in logged(trainer, "eval_loss"))
    assert trainer.evaluate()["eval_loss"] == best
    assert (tmp_path / f"checkpoint-{trainer.state.best_global_step}").is_dir()


def test_train_leaves_adapter_and_tokenizer(tmp_path: Path) -> None:
    build_trainer(tmp_path, max_steps=1).train()
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "tiny")


def test_short_run_logs_first_and_last_step(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, max_steps=3, logging_steps=50)
    trainer.train()
    assert [step for step, _ in logged(trainer)] == [1, 3]


def test_logged_speed_counts_tokens_without_padding(tmp_path: Path) -> None:
    examples = build_examples(6)
    trainer = build_trainer(tmp_path, num_train_epochs=2, examples=examples)
    trainer.train()
    assert trainer.meter.num_tokens == 2 * sum(map(len, examples))
    assert trainer.meter.num_trained_tokens == 2 * sum(example.num_trained_tokens for example in examples)
    assert all(speed > 0 for _, speed in logged(trainer, "tokens_per_second"))


def test_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path: Path) -> None:
    model = build_model()
    trainer = build_trainer(tmp_path, model=model, max_steps=8, save_strategy="steps", save_steps=2)
    good: dict[str, torch.Tensor] = {}

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                good.update(trained_values(model))
                model.get_input_embeddings().weight.data[:] = torch.nan

    trainer.add_callback(Break())
    with pytest.raises(DivergedError, match=r"step 4: the loss is nan. The batch holds examples.jsonl:\d+") as error:
        trainer.train()
    named = {part.strip() for part in str(error.value).split("holds ")[1].split(". Nothing")[0].split(",")}
    assert named <= {example.origin for example in build_examples()}
    assert_same_values(good, trained_values(model))
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize("row_tokens", [ROW_TOKENS, None])
def test_bad_batch_is_kept_and_skipped_where_asked(tmp_path: Path, row_tokens: int | None) -> None:
    model = build_model()
    trainer = build_trainer(
        tmp_path, model=model, max_steps=4, on_bad_step="skip", row_tokens=row_tokens, disable_tqdm=False
    )
    weights = model.get_input_embeddings().weight.data
    good, values = weights.clone(), {}

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights[:] = torch.nan if state.global_step == 2 else good

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            values[state.global_step] = trained_values(model)

    trainer.add_callback(Break())
    trainer.train()
    assert_same_values(values[2], values[3])
    assert any(not torch.equal(value, values[4][name]) for name, value in values[3].items())
    assert all(math.isfinite(loss) for _, loss in logged(trainer))
    note = next(note for note in trainer.notes if "is skipped" in note)
    path = tmp_path / "bad_batches" / "step-3.jsonl"
    assert f"it is skipped. It is kept in {path}" in note
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    examples = {example.origin: example for example in build_examples()}
    for row in rows:
        example = examples[row["origin"]]
        assert row["origin"] in note
        assert row["input_ids"][: len(example)] == example.input_ids.tolist()
        assert sum(label != -100 for label in row["labels"]) == example.num_trained_tokens
        assert math.isnan(row["micro_batch_loss"])


def test_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    model = build_model()
    before = trained_values(model)
    next(iter(iter_trainable(model)))[1].register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(DivergedError, match="step 1: the gradient is not finite"):
        build_trainer(tmp_path, model=model, max_steps=2).train()
    assert_same_values(before, trained_values(model))


def test_trainer_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    args = HalfbyteArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match="compute_metrics cannot be honoured"):
        HalfbyteTrainer(build_model(), args, compute_metrics=lambda prediction: {})
    model = build_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        HalfbyteTrainer(model, args)


def test_trainer_reads_the_spec_off_a_model(tmp_path: Path) -> None:
    args = HalfbyteArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = HalfbyteTrainer(build_model(), args, train_dataset=build_examples(4), options=TrainerOptions())
    trainer.train()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (SPEC.rank, SPEC.alpha, SPEC.dropout)


def test_trainer_takes_tensorboard(tmp_path: Path) -> None:
    build_trainer(tmp_path, max_steps=2, report_to="tensorboard").train()
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


def test_iter_batches_gives_every_example_once() -> None:
    examples = build_examples(9)
    for row_tokens in (None, ROW_TOKENS):
        batches = list(iter_batches(examples, BatchOptions(pad_id=0, row_tokens=row_tokens), batch_size=2))
        origins = [origin for batch in batches for origin in batch["origins"]]
        assert sorted(origins) == sorted(example.origin for example in examples)
