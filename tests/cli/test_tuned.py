"""What OUT may be: a run, an adapter, a model; and what it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.cli.tuned import find_tokenizer, find_tuned, quant_spec
from halfbyte.config import DataSection, ModelSection, QuantSection, RunConfig, TrainSection, save_run_config
from halfbyte.errors import ConfigError, FormatError
from halfbyte.quant import QuantSpec


def write_adapter(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_find_tuned_reads_how_a_run_held_its_base(tmp_path: Path) -> None:
    quant = QuantSection(codebook="fp4", block_size=128)
    data = DataSection(train="t.jsonl", system="Be kind.", max_length=77)
    save_run_config(RunConfig(model=ModelSection(path="base"), data=data, quant=quant), tmp_path)
    write_adapter(tmp_path, base_model_name_or_path="another")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    source = find_tuned(str(tmp_path), {"model.device": "cpu", "quant.block_size": "64"})
    assert source.config.model == ModelSection(path="base", device="cpu")
    assert quant_spec(source.config.quant) == QuantSpec(codebook="fp4", block_size=64, double_quant=True)
    assert source.config.data == data
    assert (source.adapter, source.tokenizer) == (tmp_path, tmp_path)


@pytest.mark.parametrize(("given", "dtype"), [({}, "bfloat16"), ({"model.dtype": "float32"}, "float32")])
def test_find_tuned_computes_as_the_run_did_unless_told_otherwise(
    tmp_path: Path, given: dict[str, str], dtype: str
) -> None:
    train = TrainSection(bf16=True)
    save_run_config(RunConfig(model=ModelSection(path="base"), data=DataSection(train="t"), train=train), tmp_path)
    assert find_tuned(str(write_adapter(tmp_path)), given).config.compute_dtype == dtype


def test_find_tuned_takes_the_base_of_a_peft_adapter(tmp_path: Path) -> None:
    source = find_tuned(str(write_adapter(tmp_path, base_model_name_or_path="base", revision="v2")), {})
    assert source.config.model == ModelSection(path="base", revision="v2")
    assert find_tuned(str(tmp_path / "adapter_model.safetensors"), {}) == source
    assert (source.config.model.path, source.adapter, source.tokenizer) == ("base", tmp_path, None)
    assert quant_spec(source.config.quant) == QuantSpec()
    assert find_tuned(str(tmp_path), {"model.path": "mine"}).config.model.path == "mine"


def test_find_tuned_takes_a_model_as_it_is(model_folder: Path) -> None:
    source = find_tuned(str(model_folder), {})
    assert (source.config.model.path, source.adapter, quant_spec(source.config.quant)) == (
        str(model_folder),
        None,
        None,
    )
    assert quant_spec(find_tuned(str(model_folder), {"quant.enabled": "true"}).config.quant) == QuantSpec()
    assert find_tuned("owner/name", {}).config.model.path == "owner/name"


def test_find_tuned_refuses_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run, adapter or model"):
        find_tuned(str(tmp_path), {})
    save_run_config(RunConfig(model=ModelSection(path="base"), data=DataSection(train="t")), tmp_path)
    with pytest.raises(ConfigError, match="a run that has not left an adapter; end it with halfbyte train "):
        find_tuned(str(tmp_path), {})


def test_find_tuned_refuses_broken_adapter_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no base model; name it with --model.path=MODEL"):
        find_tuned(str(write_adapter(tmp_path, r=16)), {})
    assert find_tuned(str(tmp_path), {"model.path": "mine"}).config.model.path == "mine"
    for text in ("{", "[]"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(FormatError, match=r"adapter_config.json is no adapter configuration"):
            find_tuned(str(tmp_path), {})


def test_find_tokenizer_needs_no_weights(model_folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    assert find_tokenizer(str(tmp_path)).chat_template == find_tokenizer(str(model_folder)).chat_template
