"""Calibrated checkpoints: closer to the model than plain ones on such inputs, and they keep adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.export import export_calibrated, merge_in_place
from halfbyte.export.calibrated import quantize_calibrated_
from halfbyte.models import load_adapter, load_model, save_adapter
from halfbyte.nn import Linear4bit, LoraSpec, attach_adapters, iter_lora, quantize_linears_
from halfbyte.quant import QuantSpec
from tests.models.tiny import build_tiny, logits_of, save_tiny
from tests.oracles import assert_close

SPEC = QuantSpec()


def make_batches(count: int = 4) -> list[torch.Tensor]:
    # Few different tokens: inputs of layers depend on each other, as those of text do.
    return [torch.randint(3, 12, (4, 32)) for _ in range(count)]


@torch.no_grad()
def logits_on(model: PreTrainedModel, batches: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(input_ids=ids, use_cache=False).logits.float() for ids in batches])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_calibrated_models_are_closer_than_plain_ones(family: str) -> None:
    batches = make_batches(8)
    expected = logits_on(build_tiny(family).eval(), batches)
    plain, calibrated = build_tiny(family).eval(), build_tiny(family).eval()
    quantize_linears_(plain, SPEC)
    done: list[int] = []
    quantize_calibrated_(calibrated, batches, SPEC, on_progress=lambda number, total: done.append(number))
    assert done == list(range(1, calibrated.config.num_hidden_layers + 1))
    layers = [m for m in calibrated.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == sum(isinstance(m, Linear4bit) for m in plain.modules())
    errors = [float((logits_on(one, batches) - expected).square().sum()) for one in (calibrated, plain)]
    assert errors[0] < 0.6 * errors[1], errors


def make_adapter(folder: Path, base: Path, *, size: float) -> Path:
    model = load_model(base, quant=SPEC, device="cpu", compute_dtype="float32").model
    spec = LoraSpec(rank=4, seed=3)
    attach_adapters(model, spec)
    torch.manual_seed(5)
    for _, layer in iter_lora(model):
        layer.lora_B.data.normal_(std=size)
    save_adapter(model, folder, base_model=str(base), spec=spec)
    return folder


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_an_adapter_is_kept_in_4_bits(tmp_path: Path, family: str) -> None:
    base = save_tiny(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", base, size=0.02)
    batches = make_batches(8)
    tuned = load_model(base, quant=SPEC, device="cpu", compute_dtype="float32").model
    without = logits_on(tuned, batches)
    load_adapter(tuned, adapter)
    expected = logits_on(tuned, batches)
    out = tmp_path / "merged"
    report = export_calibrated(base, out, SPEC, batches, adapter=adapter, trained_on=SPEC, device="cpu")
    kept = load_model(out, quant=SPEC, device="cpu", compute_dtype="float32")
    assert kept.report.num_layers_4bit == report.num_layers_4bit == 14
    loss = float((logits_on(kept.model, batches) - expected).square().sum())
    assert loss < 0.5 * float((without - expected).square().sum())
    # Rounding each weight by itself loses it.
    rounded = merge_in_place(tuned, dtype=torch.float32)
    quantize_linears_(rounded, SPEC)
    assert loss < 0.5 * float((logits_on(rounded, batches) - expected).square().sum())


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    export_calibrated(base, tmp_path / "out", SPEC, make_batches(), device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_model(tmp_path / "out", quant=SPEC, device="cpu", compute_dtype="float32").model
    # bitsandbytes multiplies in the configuration's bfloat16.
    assert_close("llama", logits_of(ours), logits_of(theirs), dtype=torch.bfloat16, roundings=8)


def test_nothing_is_left_where_it_cannot_be(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    with pytest.raises(ConfigError, match="calibration needs examples"):
        export_calibrated(base, tmp_path / "out", SPEC, [], device="cpu")
    assert not (tmp_path / "out").exists()


def test_layers_that_cannot_be_calibrated_are_named() -> None:
    model = build_tiny("llama").eval()
    model.model.extra = torch.nn.Linear(64, 64)
    with pytest.raises(ConfigError, match=r"model\.extra lies outside the decoder blocks"):
        quantize_calibrated_(model, make_batches(1), SPEC)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
