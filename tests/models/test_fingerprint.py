"""A base's fingerprint: the same for the same model wherever it lies, another for every other model."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.models.fingerprint import WHOLE_BYTES, fingerprint_base
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.source import resolve_source
from tests.models.tiny import edit_config, save_tiny
from tests.models.tiny_gguf import save_tiny_gguf


def fingerprint(path: Path) -> str:
    return fingerprint_base(resolve_source(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", shard_size="60KB")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Return a model's folder with a file that is too large to be read whole."""
    folder = save_tiny(tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["extra"] = torch.zeros(WHOLE_BYTES, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    return folder


def change_byte(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_fingerprint_is_that_of_the_model_and_not_of_its_place(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    edit_config(tmp_path / "elsewhere", transformers_version="9.9", _name_or_path="other")
    assert fingerprint(tmp_path / "elsewhere") == before
    edit_config(tmp_path / "elsewhere", rms_norm_eps=1e-3)
    assert fingerprint(tmp_path / "elsewhere") != before


def test_fingerprint_of_a_small_model_tells_a_single_bit_of_any_file(folder: Path) -> None:
    found = {fingerprint(folder)}
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        change_byte(shard, shard.stat().st_size - 1)
        found.add(fingerprint(folder))
    assert len(found) == len(shards) + 1


def test_fingerprint_of_a_large_file_tells_every_tensor_that_was_exchanged(large: Path) -> None:
    path = large / "model.safetensors"
    tensors = load_file(path)
    found = {fingerprint(large)}
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1}, path)
        found.add(fingerprint(large))
    assert len(found) == len(tensors) + 1
    save_file(tensors, path)
    assert fingerprint(large) in found


def test_fingerprint_of_a_large_file_tells_other_names_and_not_every_byte(large: Path) -> None:
    """What the module says that it does not tell, it does not: whoever makes it do so may mend the docs."""
    path = large / "model.safetensors"
    before = fingerprint(large)
    change_byte(path, path.stat().st_size - 1)
    assert fingerprint(large) == before
    tensors = load_file(path)
    tensors["other"] = tensors.pop("extra")
    save_file(tensors, path)
    assert fingerprint(large) != before


@pytest.mark.parametrize("whole_bytes", [WHOLE_BYTES, 0])
def test_fingerprint_of_a_gguf_file(whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.models.fingerprint.WHOLE_BYTES", whole_bytes)
    path = tmp_path / "model.gguf"
    save_tiny_gguf(path, "llama")
    before = fingerprint(path)
    assert fingerprint(path) == before
    tensor = list(GgufFile(path).tensors.values())[-1]
    change_byte(path, tensor.offset + tensor.num_bytes // 2)
    assert fingerprint(path) != before


@pytest.mark.parametrize("whole_bytes", [WHOLE_BYTES, 0])
def test_fingerprint_of_a_pickle(
    whole_bytes: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.models.fingerprint.WHOLE_BYTES", whole_bytes)
    (tmp_path / "pickled").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "pickled")
    path = tmp_path / "pickled" / "pytorch_model.bin"
    found = set()
    for value in range(3):
        torch.save({"weight": torch.full((64, 64), float(value))}, path)
        found.add(fingerprint(path))
    assert len(found) == 3


def test_fingerprint_of_130_gb_takes_no_second(tmp_path: Path) -> None:
    """A file with holes instead of weights: all that is timed is how many places are read."""
    size = 130_000_000_000 // 723 // 2**20 * 2**20
    table = {
        f"layer.{number}": {"dtype": "U8", "shape": [size], "data_offsets": [number * size, (number + 1) * size]}
        for number in range(723)
    }
    header = json.dumps(table).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 723 * size)
    (tmp_path / "config.json").write_text("{}")
    source = resolve_source(tmp_path)
    started = time.perf_counter()
    fingerprint_base(source)
    assert time.perf_counter() - started < 1.0
