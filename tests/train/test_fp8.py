"""Training with fp8 products of the frozen weights: what it refuses, and on a GPU how it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.config import TrainSection
from halfbyte.errors import ConfigError
from halfbyte.models.fused_layers import fuse_layers_
from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions
from halfbyte.train import fp8 as fp8_module
from halfbyte.train.fp8 import check_fp8
from tests.train.runs import NO_DROPOUT, ROW_TOKENS, SPEC, build_examples, build_model, logged
from tests.train.tiny import build_tokenizer


def build_trainer(
    folder: Path, model: PreTrainedModel, *, fused: bool = True, fp8: bool = True, graphs: bool = True, **options: Any
) -> HalfbyteTrainer:
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    arguments = {"optim": "adamw_8bit", "report_to": "none", "disable_tqdm": True, "seed": 11}
    return HalfbyteTrainer(
        model,
        HalfbyteArguments(str(folder), **{**defaults, **arguments, **options}),
        train_dataset=build_examples(),
        processing_class=build_tokenizer(),
        options=TrainerOptions(
            row_tokens=ROW_TOKENS, base_model="tiny", lora=SPEC, fused=fused, fp8=fp8, cuda_graphs=graphs
        ),
    )


@pytest.mark.parametrize(
    ("family", "fused", "message"),
    [
        ("llama", False, "only fused blocks multiply in fp8, and they are off"),
        ("gemma2", True, "only fused blocks multiply in fp8; fused blocks: none"),
        ("llama", True, "CPUs multiply no fp8"),
    ],
)
def test_trainer_refuses_fp8_where_it_cannot_be(tmp_path: Path, family: str, fused: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=f"train.fp8 cannot be honoured: {message}.*; leave it out"):
        build_trainer(tmp_path, build_model(family), fused=fused, use_cpu=True)


def test_check_fp8_refuses_other_dtypes_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_module, "why_no_fp8", lambda device: None)
    model = build_model()
    fusion = fuse_layers_(model, fp8=True)
    with pytest.raises(ConfigError, match="are in float32, and fp8 goes with bfloat16"):
        check_fp8(model, fusion)
    as_module: nn.Module = model
    as_module.to(torch.bfloat16)
    assert check_fp8(model, fusion) == "frozen weights: multiplied in fp8, adapters in 16 bits"
    model.model.layers[1].mlp.down_proj.base.out_features = 72
    with pytest.raises(ConfigError, match=r"mlp.down_proj.base is 72 x 96, .* multiples of 16"):
        check_fp8(model, fusion)


def test_train_section_refuses_fp8_without_fused_blocks() -> None:
    with pytest.raises(ConfigError, match="only fused blocks multiply in fp8"):
        TrainSection(fp8=True, fused=False)


def build_gpu_model() -> PreTrainedModel:
    model = build_model(spec=NO_DROPOUT)
    module: nn.Module = model.cuda()
    module.to(torch.bfloat16)
    return model


@pytest.mark.gpu
def test_training_in_fp8_on_a_gpu_follows_bf16_and_graphs_change_nothing(tmp_path: Path) -> None:
    losses = {}
    for name, fp8, graphs in (("bf16", False, True), ("fp8", True, True), ("launched", True, False)):
        trainer = build_trainer(tmp_path / name, build_gpu_model(), fp8=fp8, graphs=graphs, max_steps=24)
        trainer.train()
        losses[name] = torch.tensor([loss for _, loss in logged(trainer)])
    torch.testing.assert_close(losses["fp8"], losses["launched"], rtol=1e-3, atol=1e-3)
    assert not losses["fp8"].equal(losses["bf16"])
    assert losses["bf16"][-4:].mean() < losses["bf16"][:4].mean()
    torch.testing.assert_close(losses["fp8"].mean(), losses["bf16"].mean(), rtol=0.02, atol=0)
