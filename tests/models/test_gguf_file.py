from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from halfbyte.errors import FormatError
from halfbyte.models.gguf_file import GgufFile
from tests.models.tiny_gguf import save_tiny_gguf


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_tiny_gguf(tmp_path / "tiny.gguf", "qwen2", quantization="Q8_0")


def test_gguf_file_agrees_with_the_gguf_package(path: Path) -> None:
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        values = ours.read(ours.tensors[tensor.name])
        expected = gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type)
        assert torch.equal(values, torch.from_numpy(expected))
    assert ours.fields["qwen2.block_count"] == 2
    assert ours.fields["general.name"] == "tiny"


def test_gguf_file_skips_long_arrays(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_token_list([f"word{n}" for n in range(5000)])
    writer.add_token_scores([float(n) for n in range(5000)])
    writer.add_array("short", [1, 2, 3])
    writer.add_uint32("last", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = GgufFile(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.tokens"] is None
    assert fields["short"] == [1, 2, 3]
    assert fields["last"] == 7


@pytest.mark.parametrize("kept_bytes", [3, 30, 200, -8])
def test_gguf_file_refuses_a_truncated_file(path: Path, kept_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(FormatError, match=r"tiny\.gguf"):
        GgufFile(path)


def test_gguf_file_refuses_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"ggml" + bytes(100))
    with pytest.raises(FormatError, match="is not a GGUF file"):
        GgufFile(tmp_path / "x.gguf")


def test_gguf_file_refuses_an_unknown_version(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4] = 9
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="GGUF version 9"):
        GgufFile(path)
