from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from halfbyte.errors import ConfigError, FormatError
from halfbyte.models.source import resolve_source
from halfbyte.models.weights import iter_weights
from tests.models.tiny import edit_config, save_tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), shard_size="60KB")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_resolve_source_finds_every_shard(folder: Path) -> None:
    source = resolve_source(folder)
    assert source.kind == "safetensors"
    assert set(source.weight_files) == set(folder.glob("*.safetensors"))
    assert len(source.weight_files) > 1


def test_resolve_source_takes_a_single_file(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert resolve_source(tmp_path).weight_files == (tmp_path / "model.safetensors",)
    assert resolve_source(tmp_path / "model.safetensors").folder == tmp_path


def test_resolve_source_names_the_shard_that_is_missing(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FormatError, match=shard.name):
        resolve_source(folder)


def test_iter_weights_names_the_file_that_is_truncated(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(FormatError, match=rf"{shard.name} is truncated"):
        list(iter_weights(resolve_source(folder)))


def test_iter_weights_refuses_a_name_twice(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(FormatError, match="and again in"):
        list(iter_weights(resolve_source(folder)))


def test_resolve_source_refuses_a_folder_with_pickles_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pickled weights only.*Name the file itself.*pytorch_model\.bin"):
        resolve_source(folder)
    assert resolve_source(folder / "pytorch_model.bin").kind == "pickle"


def test_resolve_source_says_that_a_folder_holds_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="holds an adapter, not a model"):
        resolve_source(tmp_path)


def test_resolve_source_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no weights"):
        resolve_source(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_resolve_source_refuses_foreign_quantisation(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(FormatError, match=f"quantised by {method}"):
        resolve_source(folder)


def test_resolve_source_refuses_bitsandbytes_in_8_bits(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(FormatError, match="in 8 bits"):
        resolve_source(folder)


def test_resolve_source_names_the_line_of_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{\n"model_type": "llama",\n}')
    with pytest.raises(FormatError, match=r"config\.json:3"):
        resolve_source(folder)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "no such name"])
def test_resolve_source_refuses_what_is_nowhere(name: str) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        resolve_source(name)


def test_resolve_source_explains_a_hub_id_out_of_reach() -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        resolve_source("halfbyte-tests/no-such-model")


def test_resolve_source_finds_a_hub_id_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    source = resolve_source("someone/tiny")
    assert source.name == "someone/tiny"
    assert source.folder == repository / "snapshots" / ("0" * 40)
    assert len(source.weight_files) > 1
