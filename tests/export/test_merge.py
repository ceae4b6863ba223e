from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.export import export_bnb4bit, merge_adapter, merge_in_place
from halfbyte.models import load_adapter, load_model, save_adapter
from halfbyte.nn import LoraSpec, attach_adapters, iter_trainable
from halfbyte.quant import QuantSpec
from tests.models.measure_peak import peak_bytes, save_random_adapter, save_wide
from tests.models.tiny import logits_of, save_tiny
from tests.models.tiny_gguf import save_tiny_gguf
from tests.oracles import assert_close, relative_rms

NF4 = QuantSpec()
ROUNDINGS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 16}
ALL_LINEAR = LoraSpec(rank=4, alpha=8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), shard_size="60KB")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tied"), "llama-tied")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merge_adapter_gives_the_logits_of_the_adapter(llama: Path, tmp_path: Path, onto: str, dtype: str) -> None:
    quant = NF4 if onto == "dequantized" else None
    tuned = save_tuned(llama, tmp_path / "adapter", ALL_LINEAR, quant=quant)
    report = merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", onto=onto, dtype=dtype, spec=NF4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == getattr(torch, dtype)
    assert_merged(tuned, tmp_path / "merged", merged.dtype)
    assert report.num_adapters == 14
    assert abs(report.kept_update - 1) < 0.01
    assert dtype in str(report)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox"])
def test_merge_adapter_works_for_every_family(family: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family)
    tuned = save_tuned(base, tmp_path / "adapter", ALL_LINEAR)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="dequantized", spec=NF4, dtype="float32")
    assert_merged(tuned, tmp_path / "merged", torch.float32)


def test_merge_adapter_keeps_updates_smaller_than_half_a_step(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", ALL_LINEAR, scale=3e-3)
    report = merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", onto="original", dtype="bfloat16")
    base, merged = tensors_of(llama), tensors_of(tmp_path / "merged")
    update = {name: merged[name].float() - base[name].float() for name in base}
    moved = torch.cat([(u != 0).float().view(-1) for name, u in update.items() if "proj" in name])
    # Each weight moves a whole step, and rarely: rounding to nearest would move hardly any.
    assert 0 < moved.mean() < 0.2
    assert abs(report.kept_update - 1) < 0.1


def test_merge_adapter_is_reproducible(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", ALL_LINEAR)
    for name in ("once", "again"):
        merge_adapter(llama, tmp_path / "adapter", tmp_path / name)
    once, again = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "again")
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_merge_adapter_copies_what_no_adapter_touches(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", LoraSpec(rank=4, alpha=8, targets=("q_proj",)))
    merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", onto="original")
    base, merged = tensors_of(llama), tensors_of(tmp_path / "merged")
    assert base.keys() == merged.keys()
    for name, tensor in base.items():
        assert torch.equal(tensor, merged[name]) == ("q_proj" not in name), name


def test_merge_adapter_writes_a_whole_model(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", ALL_LINEAR)
    merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("w5").input_ids == [5]
    assert tokenizer.chat_template
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("modules_to_save", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens"), ("norm",)])
@pytest.mark.parametrize("is_tied", [True, False])
def test_merge_adapter_takes_modules_trained_whole(
    llama: Path, tied: Path, tmp_path: Path, is_tied: bool, modules_to_save: tuple[str, ...]
) -> None:
    base = tied if is_tied else llama
    spec = LoraSpec(rank=4, alpha=8, targets=("q_proj",), modules_to_save=modules_to_save)
    tuned = save_tuned(base, tmp_path / "adapter", spec, quant=None)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="original", dtype="float32")
    assert_merged(tuned, tmp_path / "merged", torch.float32)


def test_merge_adapter_unties_a_head_with_an_adapter(tied: Path, tmp_path: Path) -> None:
    tuned = save_tuned(tied, tmp_path / "adapter", LoraSpec(rank=4, alpha=8, targets=("lm_head", "q_proj")), quant=None)
    report = merge_adapter(tied, tmp_path / "adapter", tmp_path / "merged", onto="original", dtype="float32")
    assert_merged(tuned, tmp_path / "merged", torch.float32)
    assert "they are two now" in str(report)


def test_merge_adapter_takes_rank_and_alpha_patterns(llama: Path, tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, rslora=True)
    tuned = save_tuned(llama, tmp_path / "adapter", spec, quant=None)
    merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", onto="original", dtype="float32")
    assert_merged(tuned, tmp_path / "merged", torch.float32)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merge_adapter_takes_dora(llama: Path, tmp_path: Path, onto: str) -> None:
    quant = NF4 if onto == "dequantized" else None
    tuned = save_tuned(llama, tmp_path / "adapter", LoraSpec(rank=4, alpha=8, dora=True), quant=quant)
    report = merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", onto=onto, dtype="float32", spec=NF4)
    assert_merged(tuned, tmp_path / "merged", torch.float32)
    assert abs(report.kept_update - 1) < 0.01


def test_merge_adapter_takes_a_gguf_base(tmp_path: Path) -> None:
    base = save_tiny_gguf(tmp_path / "tiny.gguf", "llama", quantization="Q8_0")
    tuned = save_tuned(base, tmp_path / "adapter", ALL_LINEAR)
    build = save_tiny(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((build / name).read_bytes())
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="dequantized", spec=NF4, dtype="float32")
    # Loading keeps the embedding of a quantised file in float16.
    assert_merged(tuned, tmp_path / "merged", torch.float16)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w5").input_ids == [5]


def test_merge_adapter_takes_a_4bit_base(llama: Path, tmp_path: Path) -> None:
    export_bnb4bit(llama, tmp_path / "nf4", NF4)
    tuned = save_tuned(tmp_path / "nf4", tmp_path / "adapter", ALL_LINEAR)
    report = merge_adapter(
        tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged", onto="original", dtype="float32"
    )
    assert_merged(tuned, tmp_path / "merged", torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "stored in 4 bits" in str(report)


def test_merge_adapter_takes_a_mixture_of_experts(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "mixtral")
    tuned = save_tuned(base, tmp_path / "adapter", LoraSpec(rank=4, alpha=8, targets=("q_proj", "o_proj")), quant=None)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="original", dtype="float32")
    assert_merged(tuned, tmp_path / "merged", torch.float32)


def test_merge_adapter_needs_a_few_blocks_of_memory(tmp_path: Path) -> None:
    base = save_wide(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    measured = peak_bytes("merge", base, adapter, tmp_path / "merged")
    # A few megabytes of blocks and one tensor in 4 bits; the rest is freed memory that the allocator keeps. The model
    # itself has 88 MB.
    assert measured["peak"] <= 40 << 20


def test_merge_adapter_finds_out_how_the_run_was_quantised(llama: Path, tmp_path: Path) -> None:
    spec = QuantSpec(codebook="fp4", block_size=128, double_quant=False)
    tuned = save_tuned(llama, tmp_path / "adapter", ALL_LINEAR, quant=spec)
    (tmp_path / "adapter" / "run.yaml").write_text(
        "quant:\n  codebook: fp4\n  block_size: 128\n  double_quant: false\n"
    )
    merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert_merged(tuned, tmp_path / "merged", torch.float32)


def test_merge_adapter_takes_a_run_that_was_not_quantised(llama: Path, tmp_path: Path) -> None:
    tuned = save_tuned(llama, tmp_path / "adapter", ALL_LINEAR, quant=None)
    (tmp_path / "adapter" / "run.yaml").write_text("quant:\n  enabled: false\n")
    report = merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert_merged(tuned, tmp_path / "merged", torch.float32)
    assert "was not quantised" in str(report)


def test_merge_adapter_refuses_a_folder_in_use(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", ALL_LINEAR)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "precious.txt").read_text() == "mine"
    merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged" / "precious.txt").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_merge_adapter_leaves_nothing_behind_when_it_fails(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    save_tuned(llama, tmp_path / "adapter", ALL_LINEAR)
    shard = sorted(base.glob("*.safetensors"))[0]
    tensors = {name: tensor * float("1e6") for name, tensor in load_file(shard).items()}
    save_file(tensors, shard)
    with pytest.raises(FormatError, match="beyond float16"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="original", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_merge_adapter_refuses_an_adapter_for_another_model(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", ALL_LINEAR)
    other = save_tiny(tmp_path / "other", "phi3")
    with pytest.raises(FormatError, match="for another model"):
        merge_adapter(other, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("options", [{"onto": "base"}, {"dtype": "int8"}])
def test_merge_adapter_refuses_unknown_options(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options.values()))):
        merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [
        ALL_LINEAR,
        LoraSpec(rank=4, dora=True),
        LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("embed_tokens",)),
    ],
)
@pytest.mark.parametrize("is_tied", [True, False])
def test_merge_in_place_leaves_a_plain_model(
    llama: Path, tied: Path, tmp_path: Path, is_tied: bool, spec: LoraSpec, dtype: torch.dtype
) -> None:
    tuned = save_tuned(tied if is_tied else llama, tmp_path / "adapter", spec)
    expected = logits_of(tuned)
    merged = merge_in_place(tuned, dtype=dtype)
    assert merged is tuned
    assert not any(type(module).__module__.startswith("halfbyte") for module in merged.modules())
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert relative_rms(expected, logits_of(merged)) <= limit(dtype)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits_of(again), logits_of(merged))


def save_tuned(
    base: Path, folder: Path, spec: LoraSpec, *, quant: QuantSpec | None = NF4, scale: float = 0.1
) -> PreTrainedModel:
    """Write an adapter with random values and return the model that has it."""
    model = load_model(base, quant=quant, compute_dtype="float32", device="cpu").model
    attach_adapters(model, spec)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in iter_trainable(model):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if "lora" in name else parameter + noise)
    save_adapter(model, folder, base_model=str(base), spec=spec)
    # Anew, so that what is compared went through the file.
    model = load_model(base, quant=quant, compute_dtype="float32", device="cpu").model
    load_adapter(model, folder)
    return model


def assert_merged(tuned: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Compare in fp32 products: what is measured is the rounding of the weights."""
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_close("logits", logits_of(tuned), logits_of(merged), dtype=dtype, roundings=ROUNDINGS[dtype])
    assert merged.generation_config.eos_token_id == tuned.generation_config.eos_token_id


def limit(dtype: torch.dtype) -> float:
    return ROUNDINGS[dtype] * torch.finfo(dtype).eps


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
