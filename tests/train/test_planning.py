"""What a run's plan makes of its configuration on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.config import DataSection, LoraSection, MemorySection, ModelSection, QuantSection, RunConfig, TrainSection
from halfbyte.config.load import save_run_config
from halfbyte.errors import ConfigError, PlanError
from halfbyte.memory.request import pins_of, run_shape_of
from halfbyte.models.streaming import ON_DEVICE
from halfbyte.train.planning import plan_run
from tests.train.tiny import build_tiny

CPU = torch.device("cpu")


def config_of(folder: Path, family: str = "llama", **sections: Any) -> RunConfig:
    build_tiny(family).save_pretrained(folder / "model")
    return RunConfig(
        model=ModelSection(path=str(folder / "model"), device="cpu"), data=DataSection(train="x.jsonl"), **sections
    )


def test_a_run_that_fits_keeps_what_it_asked_for(tmp_path: Path) -> None:
    planned = plan_run(config_of(tmp_path), CPU)
    assert planned.config.train.per_device_train_batch_size == 4
    assert planned.config.train.gradient_accumulation_steps == 1
    assert planned.residency == ON_DEVICE
    assert planned.policies == ("keep", "keep")
    assert planned.text.startswith("plan: ")
    assert "in all" in planned.text


def test_the_batch_is_divided(tmp_path: Path) -> None:
    planned = plan_run(config_of(tmp_path, train=TrainSection(batch_size=12)), CPU)
    train = planned.config.train
    assert train.batch_size is None
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 12


def test_a_run_is_continued_as_it_was_divided(tmp_path: Path) -> None:
    config = config_of(tmp_path, train=TrainSection(batch_size=12, resume=True))
    config = dataclasses.replace(config, output_dir=str(tmp_path))
    before = TrainSection(per_device_train_batch_size=3, gradient_accumulation_steps=4)
    save_run_config(dataclasses.replace(config, train=before), tmp_path)
    train = plan_run(config, CPU).config.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (3, 4)


def test_too_little_memory_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = config_of(tmp_path, memory=MemorySection(host="300MiB"))
    with pytest.raises(PlanError, match=r"does not fit: it takes at least .* of memory, and 0\.29 GiB are free"):
        plan_run(config, CPU)


def test_other_architectures_are_planned_more_roughly(tmp_path: Path) -> None:
    planned = plan_run(config_of(tmp_path, "gemma2", train=TrainSection(batch_size=8)), CPU)
    assert "path for any architecture" in planned.text
    assert planned.policies is None
    train = planned.config.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 8


def test_without_a_plan_there_is_a_run(tmp_path: Path) -> None:
    whole = LoraSection(modules_to_save=("norm",))
    planned = plan_run(config_of(tmp_path, lora=whole, train=TrainSection(batch_size=8)), CPU)
    assert planned.text.startswith("no memory plan: modules trained whole")
    assert planned.policies is None
    assert planned.config.train.gradient_accumulation_steps == 2
    odd = config_of(tmp_path, lora=whole, train=TrainSection(batch_size=7))
    with pytest.raises(ConfigError, match=r"set train\.per_device_train_batch_size to a divisor"):
        plan_run(odd, CPU)


def test_what_a_configuration_asks_for(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        lora=LoraSection(rank=8, rank_pattern={"q_proj": 32}, targets=("q_proj", "model.layers.0.mlp.down_proj")),
        quant=QuantSection(block_size=128, double_quant=False),
        train=TrainSection(
            per_device_train_batch_size=2, gradient_accumulation_steps=8, optim="paged_adamw_32bit", fp8=True
        ),
        memory=MemorySection(streamed_blocks=2),
    )
    run = run_shape_of(config, compute_bytes=2)
    assert (run.rank, run.targets, run.block_size, run.double_quant) == (32, ("q_proj", "down_proj"), 128, False)
    assert (run.batch_rows, run.state_bits, run.pages_optimizer, run.fp8) == (16, 32, True, True)
    assert (pins_of(config).rows, pins_of(config).streamed_blocks) == (2, 2)
    whole = dataclasses.replace(config, lora=LoraSection(modules_to_save=("norm",)))
    with pytest.raises(PlanError, match="modules_to_save"):
        run_shape_of(whole, compute_bytes=2)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gpu": "much"}, "memory.gpu is 'much'; write a size such as 8GiB"),
        ({"host": "0GiB"}, "memory.host is '0GiB'"),
        ({"streamed_blocks": -1}, "memory.streamed_blocks is -1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemorySection(**section)


def test_combinations_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"streamed_blocks needs weights in 4 bits"):
        config_of(tmp_path, memory=MemorySection(streamed_blocks=1), quant=QuantSection(enabled=False))
    with pytest.raises(ConfigError, match="embedding trained"):
        config_of(
            tmp_path,
            memory=MemorySection(embedding_on_host=True),
            lora=LoraSection(modules_to_save=("embed_tokens",)),
        )
    with pytest.raises(ConfigError, match=r"leave train\.gradient_accumulation_steps out"):
        TrainSection(batch_size=8, gradient_accumulation_steps=2)
