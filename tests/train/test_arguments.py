from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from halfbyte.errors import ConfigError
from halfbyte.train.arguments import CHECKPOINTING, NAMES, HalfbyteArguments, translate_names


def build(folder: Path, **options: Any) -> HalfbyteArguments:
    return HalfbyteArguments(str(folder), use_cpu=True, report_to="none", **options)


def test_arguments_take_the_recipe_as_it_was_written(tmp_path: Path) -> None:
    args = HalfbyteArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        optim="paged_adamw_8bit",
        learning_rate=2e-4,
        fp16=False,
        bf16=True,
        max_grad_norm=0.3,
        warmup_ratio=0.03,
        group_by_length=True,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_steps=500,
    )
    assert args.get_warmup_steps(1000) == 30
    assert args.train_sampling_strategy == "group_by_length"
    assert args.bf16
    assert not args.fp16


def test_bf16_needs_no_gpu_and_wraps_nothing_in_autocast(tmp_path: Path) -> None:
    args = build(tmp_path, bf16=True)
    assert args.bf16
    assert args.mixed_precision == "no"


def test_arguments_survive_being_copied(tmp_path: Path) -> None:
    args = build(tmp_path, bf16=True, warmup_ratio=0.1, gradient_checkpointing=True)
    copy = dataclasses.replace(args, learning_rate=1.0)
    assert copy.learning_rate == 1.0
    assert (copy.bf16, copy.warmup_steps, copy.mixed_precision) == (True, args.warmup_steps, "no")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.0, "warmup_steps": 7}, {"warmup_steps": 7}),
        ({"group_by_length": False}, {}),
        ({"save_safetensors": True}, {}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
    ],
)
def test_translate_names_reads_old_names(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translate_names(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": 1.0}, "no training argument lerning_rate; did you mean learning_rate"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "both set"),
        ({"evaluation_strategy": "no", "eval_strategy": "steps"}, "contradicts"),
        ({"save_safetensors": False}, "cannot be honoured"),
    ],
)
def test_translate_names_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate_names(given)


@pytest.mark.parametrize(
    "given",
    [{"label_smoothing_factor": 0.1}, {"torch_compile": True}, {"push_to_hub": True}, {"use_liger_kernel": True}],
)
def test_arguments_refuse_what_would_be_ignored(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be honoured"):
        build(tmp_path, **given)


def test_arguments_refuse_two_precisions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        build(tmp_path, bf16=True, fp16=True)


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_checkpointing_has_two_names(tmp_path: Path, name: str) -> None:
    args = build(tmp_path, **{name: True})
    assert args.checkpointing is True
    args.set_checkpointing(True)
    for known in set(CHECKPOINTING) & NAMES:
        assert getattr(args, known) is True
        assert getattr(args, f"{known}_kwargs")["use_reentrant"] is False


def test_checkpointing_may_be_auto(tmp_path: Path) -> None:
    args = build(tmp_path, gradient_checkpointing="auto")
    assert args.checkpointing == "auto"


def test_every_option_of_transformers_is_accepted_or_refused_with_its_default(tmp_path: Path) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(TrainingArguments.__init__).parameters.items()
        if name in NAMES and name not in ("output_dir", "use_cpu", "report_to")
    }
    assert build(tmp_path, **defaults).num_train_epochs == 3.0
