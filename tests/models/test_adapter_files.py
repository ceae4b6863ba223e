from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.models.adapter_files import load_adapter, save_adapter
from halfbyte.models.load import load_model
from halfbyte.nn import Linear4bit, LoraSpec, adapters_disabled, attach_adapters, iter_lora, iter_trainable
from halfbyte.quant import QuantSpec
from tests.models.tiny import logits_of, save_tiny
from tests.oracles import assert_close

# PEFT asks for a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROUNDINGS = 64
ATTENTION = r"model\.layers\.\d+\.self_attn\.[qv]_proj"
SPECS = {
    "all linear": LoraSpec(rank=4, alpha=8),
    "names": LoraSpec(rank=4, alpha=6, targets=("q_proj", "down_proj")),
    "regex": LoraSpec(rank=4, alpha=8, targets=ATTENTION),
    # The tiny models' keys and values are 32 wide, everything else 64 or 96.
    "wider than the layers": LoraSpec(rank=112, alpha=112),
    "rslora": LoraSpec(rank=4, alpha=8, rslora=True),
    "patterns": LoraSpec(
        rank=4, alpha=8, rank_pattern={"q_proj": 2, r"layers\.1\..*up_proj": 6}, alpha_pattern={"q_proj": 3}
    ),
    "excluded": LoraSpec(rank=4, alpha=8, exclude=("q_proj",)),
    "one layer": LoraSpec(rank=4, alpha=8, targets=("q_proj", "up_proj"), layers_to_transform=(1,)),
    "one layer, all linear": LoraSpec(rank=4, alpha=8, layers_to_transform=(0,), layers_pattern="layers"),
    "trained whole": LoraSpec(rank=4, alpha=8, targets=("q_proj",), modules_to_save=("lm_head", "embed_tokens")),
    "qwen biases": LoraSpec(rank=4, alpha=8),
    "dora": LoraSpec(rank=4, alpha=8, dora=True),
    "dora of some": LoraSpec(rank=4, alpha=6, dora=True, rslora=True, targets=("q_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), dtype=torch.float32)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qwen2"), "qwen2", dtype=torch.float32)


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    save_tuned(llama, tmp_path / "adapter", SPECS["names"])
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", SPECS)
def test_save_adapter_is_read_by_peft(name: str, llama: Path, qwen2: Path, tmp_path: Path) -> None:
    base = qwen2 if name == "qwen biases" else llama
    ours = save_tuned(base, tmp_path, SPECS[name])
    theirs = PeftModel.from_pretrained(dequantized(ours, base), tmp_path).eval()
    assert_close("tuned", logits_of(theirs), logits_of(ours), dtype=torch.float32, roundings=ROUNDINGS)
    with adapters_disabled(ours):
        untuned = logits_of(ours)
    assert not torch.allclose(untuned, logits_of(ours), rtol=1e-3)
    assert_same_tensors(theirs, ours)


# PEFT itself refuses all-linear together with layers_to_transform.
@pytest.mark.parametrize("name", sorted(SPECS.keys() - {"one layer, all linear"}))
def test_load_adapter_reads_what_peft_wrote(name: str, llama: Path, qwen2: Path, tmp_path: Path) -> None:
    base = qwen2 if name == "qwen biases" else llama
    ours = load_model(base, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    spec = SPECS[name]
    theirs = get_peft_model(
        dequantized(ours, base),
        LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
            exclude_modules=list(spec.exclude) or None,
            rank_pattern=dict(spec.rank_pattern),
            alpha_pattern=dict(spec.alpha_pattern),
            layers_to_transform=list(spec.layers_to_transform) if spec.layers_to_transform else None,
            layers_pattern=spec.layers_pattern,
            modules_to_save=list(spec.modules_to_save) or None,
            task_type="CAUSAL_LM",
        ),
    ).eval()
    randomise(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    report = load_adapter(ours, tmp_path)
    assert_close("tuned", logits_of(theirs), logits_of(ours), dtype=torch.float32, roundings=ROUNDINGS)
    assert report.num_modules == sum(1 for key in theirs.state_dict() if key.endswith("lora_A.default.weight"))
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_save_adapter_writes_only_well_known_fields(adapter: Path) -> None:
    values = json.loads((adapter / "adapter_config.json").read_text())
    first_release_with_rslora = {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save",
        "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
    }  # fmt: skip
    assert values.keys() == first_release_with_rslora
    assert values["lora_alpha"] == 6
    assert isinstance(values["lora_alpha"], int)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)


def test_save_adapter_says_dora_in_the_words_of_peft(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path, SPECS["dora"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"].shape == (64,)


def test_load_adapter_wants_every_magnitude(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path, SPECS["dora"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({**tensors, key: torch.ones(63)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"lora_magnitude_vector \[63\] for 64 outputs"):
        logits_with(llama, tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="13 magnitudes for 14 adapters"):
        logits_with(llama, tmp_path)


def test_save_adapter_leaves_no_temporary_files(adapter: Path) -> None:
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_load_adapter_can_go_on_training(llama: Path, adapter: Path) -> None:
    model = load_model(llama, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    report = load_adapter(model, adapter, trainable=True)
    assert report.num_modules == 4
    assert {name.rpartition(".")[2] for name, _ in iter_trainable(model)} == {"lora_A", "lora_B"}
    assert report.trainable_parameters == sum(p.numel() for _, p in iter_trainable(model))


def test_load_adapter_takes_a_file_by_any_name(llama: Path, adapter: Path) -> None:
    expected = logits_with(llama, adapter)
    assert torch.equal(logits_with(llama, adapter / "adapter_model.safetensors"), expected)
    # A name that is not there, as old scripts write it, means the file beside it.
    assert torch.equal(logits_with(llama, adapter / "adapter_model.bin"), expected)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert torch.equal(logits_with(llama, adapter / "adapter_model.bin"), expected)


def test_load_adapter_reads_a_pickle_only_by_name(llama: Path, adapter: Path) -> None:
    expected = logits_with(llama, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(logits_with(llama, adapter / "adapter_model.bin"), expected)
    with pytest.raises(FormatError, match="pickled adapter only"):
        logits_with(llama, adapter)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model.model.base_model.model."),
        ("base_model.model.model.", "base_model.model."),
        (".weight", ".default.weight"),
    ],
)
def test_load_adapter_reads_the_keys_of_other_writers(
    llama: Path, adapter: Path, pattern: str, replacement: str
) -> None:
    expected = logits_with(llama, adapter)
    rewrite(adapter, lambda key, tensor: (key.replace(pattern, replacement, 1), tensor))
    assert torch.equal(logits_with(llama, adapter), expected)


def test_load_adapter_accepts_names_of_other_families(llama: Path, adapter: Path) -> None:
    expected = logits_with(llama, adapter)
    edit(adapter, target_modules=["q_proj", "down_proj", "c_attn", "query_key_value"])
    assert torch.equal(logits_with(llama, adapter), expected)


def test_load_adapter_refuses_an_adapter_for_other_layers(llama: Path, adapter: Path) -> None:
    rewrite(adapter, lambda key, tensor: (key.replace("self_attn", "attention"), tensor))
    with pytest.raises(FormatError, match=r"for another model: 2 of its 4 layers.*layers\.0\.attention\.q_proj"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_an_adapter_of_another_width(llama: Path, adapter: Path) -> None:
    rewrite(adapter, lambda key, t: (key, torch.randn(4, 128) if "lora_A" in key else t))
    with pytest.raises(FormatError, match=r"for another model: .*lora_A \[4, 128\].* layer of 64 x 96"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_an_adapter_without_effect(llama: Path, adapter: Path) -> None:
    rewrite(adapter, lambda key, tensor: (key, torch.zeros_like(tensor) if "lora_B" in key else tensor))
    with pytest.raises(FormatError, match="would have no effect"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_values_that_are_not_finite(llama: Path, adapter: Path) -> None:
    rewrite(adapter, lambda key, tensor: (key, tensor / 0 if "1.self_attn.q_proj.lora_B" in key else tensor))
    with pytest.raises(FormatError, match=r"not finite"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_half_an_adapter(llama: Path, adapter: Path) -> None:
    rewrite(adapter, lambda key, tensor: None if "1.self_attn.q_proj.lora_B" in key else (key, tensor))
    with pytest.raises(FormatError, match=r"incomplete: model\.layers\.1\.self_attn\.q_proj"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_a_file_that_lacks_layers(llama: Path, adapter: Path) -> None:
    rewrite(adapter, lambda key, tensor: None if "1.self_attn.q_proj" in key else (key, tensor))
    with pytest.raises(FormatError, match=r"lacks the tensors of model\.layers\.1\.self_attn\.q_proj"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_layers_that_the_config_does_not_mean(llama: Path, adapter: Path) -> None:
    edit(adapter, target_modules=["q_proj"])
    with pytest.raises(FormatError, match=r"has tensors for model\.layers\.0\.mlp\.down_proj"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_another_rank_than_the_config_says(llama: Path, adapter: Path) -> None:
    edit(adapter, r=8)
    with pytest.raises(FormatError, match="has rank 4"):
        logits_with(llama, adapter)


def test_load_adapter_leaves_the_model_alone_when_it_refuses(llama: Path, adapter: Path) -> None:
    model = load_model(llama, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    edit(adapter, r=8)
    with pytest.raises(FormatError):
        load_adapter(model, adapter)
    assert not list(iter_lora(model))


def test_load_adapter_refuses_a_second_adapter(llama: Path, adapter: Path) -> None:
    model = load_model(llama, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    load_adapter(model, adapter)
    with pytest.raises(ConfigError, match="adapters already"):
        load_adapter(model, adapter)


@pytest.mark.parametrize(
    ("key", "what"),
    [("lora_magnitude_vector", "use_dora false"), ("lora_embedding_A", "embeddings"), ("lora_B.bias", "biases")],
)
def test_load_adapter_refuses_other_kinds_of_adapters(llama: Path, adapter: Path, key: str, what: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{key}"] = torch.ones(64)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=what):
        logits_with(llama, adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
    ],
)
def test_load_adapter_refuses_what_it_would_compute_wrongly(
    llama: Path, adapter: Path, changes: dict[str, Any]
) -> None:
    edit(adapter, **changes)
    with pytest.raises(FormatError, match=next(iter(changes))):
        logits_with(llama, adapter)


def test_load_adapter_names_a_truncated_file(llama: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors is truncated"):
        logits_with(llama, adapter)


def test_load_adapter_refuses_a_folder_without_one(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no adapter"):
        logits_with(llama, tmp_path)
    with pytest.raises(FormatError, match="no such file or folder"):
        logits_with(llama, tmp_path / "none")


def save_tuned(base: Path, folder: Path, spec: LoraSpec) -> PreTrainedModel:
    model = load_model(base, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    attach_adapters(model, spec)
    randomise(parameter for _, parameter in iter_trainable(model))
    save_adapter(model, folder, base_model=str(base), spec=spec)
    return model.eval()


def randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def dequantized(model: PreTrainedModel, base: Path) -> PreTrainedModel:
    """Return transformers' own model with the weights that `model` computes with."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = {path.replace(".base", ""): m for path, m in model.named_modules() if isinstance(m, Linear4bit)}
    with torch.no_grad():
        for path, layer in layers.items():
            plain.get_submodule(path).weight.copy_(layer.weight)
    return plain.eval()


def assert_same_tensors(theirs: PeftModel, ours: PreTrainedModel) -> None:
    state = theirs.state_dict()
    for path, layer in iter_lora(ours):
        assert torch.equal(state[f"base_model.model.{path}.lora_A.default.weight"], layer.lora_A)
        assert torch.equal(state[f"base_model.model.{path}.lora_B.default.weight"], layer.lora_B)
        if layer.lora_magnitude_vector is not None:
            magnitude = state[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
            assert torch.equal(magnitude, layer.lora_magnitude_vector)


def logits_with(base: Path, adapter: Path) -> torch.Tensor:
    model = load_model(base, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    load_adapter(model, adapter)
    return logits_of(model)


def rewrite(adapter: Path, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    changed = [change(key, tensor) for key, tensor in load_file(path).items()]
    save_file(dict(entry for entry in changed if entry is not None), path)


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
