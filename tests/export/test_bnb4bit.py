from __future__ import annotations

from pathlib import Path
from typing import Literal

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from halfbyte.errors import ConfigError, FormatError
from halfbyte.export import export_bnb4bit
from halfbyte.models import load_model
from halfbyte.quant import QuantSpec
from tests.models.tiny import logits_of, save_tiny
from tests.models.tiny_gguf import save_tiny_gguf
from tests.oracles import assert_close


@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec(double_quant=False), QuantSpec(codebook="fp4", block_size=128)]
)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "phi3", "gemma3"])
def test_export_bnb4bit_is_loaded_by_transformers(family: str, spec: QuantSpec, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family, shard_size="60KB")
    report = export_bnb4bit(base, tmp_path / "out", spec)
    # In train mode bitsandbytes does not repack weights for inference.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu").train()
    assert {type(module).__name__ for module in theirs.modules()} >= {"Linear4bit"}
    ours = load_model(base, quant=spec, compute_dtype="float32", device="cpu")
    assert_close(family, logits_of(ours.model), logits_of(theirs), dtype=torch.bfloat16, roundings=8)
    assert report.num_layers_4bit == ours.report.num_layers_4bit
    assert report.parameters_4bit == ours.report.parameters_4bit
    of_base, of_export = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert of_export("w5 w6").input_ids == of_base("w5 w6").input_ids


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_export_bnb4bit_gives_the_same_logits_in_plain_transformers(
    codebook: Literal["nf4", "fp4"], double_quant: bool, tmp_path: Path
) -> None:
    base, spec = save_tiny(tmp_path / "base"), QuantSpec(codebook=codebook, double_quant=double_quant)
    # With products in float32 nothing is left to differ but the order of sums.
    export_bnb4bit(base, tmp_path / "out", spec, dtype=torch.float32)
    # In train mode bitsandbytes does not repack weights for inference, where it would compute in bfloat16.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").train()
    layers = [module for module in theirs.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    state = layers[0].weight.quant_state
    assert (state.quant_type, state.nested) == (codebook, double_quant)
    ours = load_model(base, quant=spec, compute_dtype="float32", device="cpu").model
    # Two blocks of seven products, each a sum of up to 96 terms that both sides round in their own order.
    assert_close("logits", logits_of(ours), logits_of(theirs), dtype=torch.float32, roundings=14, reduction_length=96)


def test_export_bnb4bit_writes_the_bytes_of_bitsandbytes(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    export_bnb4bit(base, tmp_path / "ours", QuantSpec())
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_export_bnb4bit_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    base = save_tiny_gguf(tmp_path / "tiny.gguf", "qwen2")
    # This file has no tokenizer, which shows only when the weights are written.
    with pytest.raises(FormatError, match="no tokenizer"):
        export_bnb4bit(base, tmp_path / "out", QuantSpec())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_export_bnb4bit_reads_back_the_same(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    export_bnb4bit(base, tmp_path / "out", QuantSpec())
    once = load_model(base, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    again = load_model(tmp_path / "out", quant=None, compute_dtype="float32", device="cpu").model
    assert torch.equal(logits_of(once), logits_of(again))


def test_export_bnb4bit_refuses_what_is_in_4_bits(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    export_bnb4bit(base, tmp_path / "out", QuantSpec())
    with pytest.raises(ConfigError, match="in 4 bits already"):
        export_bnb4bit(tmp_path / "out", tmp_path / "again", QuantSpec())


def test_export_bnb4bit_refuses_experts_that_would_stay_in_16_bits(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "mixtral")
    with pytest.raises(ConfigError, match="stacked expert tensors"):
        export_bnb4bit(base, tmp_path / "out", QuantSpec())
    export_bnb4bit(base, tmp_path / "out", QuantSpec(), allow_16bit_experts=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu").train()
    ours = load_model(base, quant=QuantSpec(), compute_dtype="float32", device="cpu", allow_16bit_experts=True).model
    assert_close("mixtral", logits_of(ours), logits_of(theirs), dtype=torch.bfloat16, roundings=8)
