from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfbyte.config import DataSection, ModelSection, QuantSection, RunConfig, TrainSection
from halfbyte.config.load import save_run_config
from halfbyte.errors import ConfigError
from halfbyte.models import load_model, load_run, save_adapter
from halfbyte.nn import Linear4bit, LoraSpec, attach_adapters, iter_trainable
from halfbyte.quant import QuantSpec
from tests.models.tiny import build_tokenizer, logits_of, save_tiny

SPEC = QuantSpec(codebook="fp4", block_size=128, double_quant=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run in FP4 with a tokenizer of its own; the logits of its model lie beside it."""
    folder = tmp_path / "run"
    loaded = load_model(base, quant=SPEC, compute_dtype="float32", device="cpu")
    spec = LoraSpec(rank=4, alpha=8)
    attach_adapters(loaded.model, spec)
    with torch.no_grad():
        for _, parameter in iter_trainable(loaded.model):
            parameter.normal_(0, 0.1)
    save_adapter(loaded.model, folder, base_model=str(base), spec=spec)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "of the run"
    tokenizer.save_pretrained(folder)
    config = RunConfig(
        model=ModelSection(path=str(base), dtype="float32", device="cpu"),
        quant=QuantSection(codebook="fp4", block_size=128, double_quant=False),
        data=DataSection(train="x.jsonl"),
    )
    save_run_config(config, folder)
    torch.save(logits_of(loaded.model.eval()), tmp_path / "logits.pt")
    return folder


def test_load_run_holds_the_base_as_in_training(run: Path) -> None:
    loaded = load_run(run)
    layers = [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert all(layer.quantized.spec == SPEC for layer in layers)
    assert torch.equal(logits_of(loaded.model), torch.load(run.parent / "logits.pt"))
    assert loaded.tokenizer.chat_template == "of the run"


def test_load_run_computes_in_the_runs_dtype_by_either_name(run: Path, base: Path) -> None:
    config = RunConfig(
        model=ModelSection(path=str(base), device="cpu"),
        data=DataSection(train="x.jsonl"),
        train=TrainSection(bf16=True),
    )
    save_run_config(config, run)
    assert (
        load_run(run).report.compute_dtype
        == load_model(base, quant=None, compute_dtype="bfloat16").report.compute_dtype
    )
    assert load_run(run, compute_dtype="float32").report.compute_dtype == torch.float32


def test_load_run_takes_an_adapter_made_elsewhere(run: Path) -> None:
    (run / "run.yaml").unlink()
    loaded = load_run(run / "adapter_model.safetensors", compute_dtype="float32", device="cpu")
    layers = [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]
    assert {layer.quantized.spec for layer in layers} == {QuantSpec()}


def test_load_run_takes_a_base_that_has_moved(run: Path, base: Path) -> None:
    base.rename(base.with_name("moved"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_run(run)
    moved = load_run(run, base_model=base.with_name("moved"))
    assert torch.equal(logits_of(moved.model), torch.load(run.parent / "logits.pt"))


def test_load_run_refuses_an_adapter_without_a_base(run: Path) -> None:
    (run / "run.yaml").unlink()
    path = run / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base model"):
        load_run(run)
