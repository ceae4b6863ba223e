from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from halfbyte.export.shards import SMALL_BYTES, ShardWriter
from halfbyte.models.safetensors_file import load_header

LARGE = SMALL_BYTES // 2 + 100
TENSORS = {
    "large.half": torch.randn(LARGE).to(torch.bfloat16),
    "small.odd": torch.arange(7, dtype=torch.uint8),
    "small.float": torch.randn(3, 5),
    "large.odd": torch.arange(2 * LARGE + 1, dtype=torch.uint8),
    "large.float": torch.randn(LARGE, 1),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("max_shard_bytes", [10_000_000, 200_000, 1])
def test_shard_writer_is_read_by_safetensors(tmp_path: Path, max_shard_bytes: int) -> None:
    paths = write(tmp_path, TENSORS, max_shard_bytes=max_shard_bytes)
    read = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    for path in paths:
        load_header(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_shard_writer_writes_an_index_for_several_shards(tmp_path: Path) -> None:
    paths = write(tmp_path, TENSORS, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert {tmp_path / name for name in index["weight_map"].values()} == set(paths)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(p.name for p in paths), "model.safetensors.index.json"]
    )


def test_shard_writer_writes_one_file_without_an_index(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shard_writer_takes_parts(tmp_path: Path) -> None:
    whole = torch.randn(1000, 64)
    writer = ShardWriter(tmp_path, ["whole", "little"])
    writer.add_parts("whole", (part for part in whole.split(300)), dtype=whole.dtype, shape=(1000, 64))
    writer.add_parts("little", iter([torch.ones(1, 2), torch.zeros(2, 2)]), dtype=torch.float32, shape=(3, 2))
    (path,) = writer.close()
    assert torch.equal(load_file(path)["whole"], whole)
    assert load_file(path)["little"].tolist() == [[1, 1], [0, 0], [0, 0]]


def write(folder: Path, tensors: dict[str, torch.Tensor], *, max_shard_bytes: int = 10_000_000) -> list[Path]:
    writer = ShardWriter(folder, tensors, max_shard_bytes=max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.close()
