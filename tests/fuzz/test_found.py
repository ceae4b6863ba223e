"""What fuzzing found, one small file each: before, these ended in a traceback, or took all the memory or time."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from halfbyte.config.foreign import translate_file
from halfbyte.config.load import load_config
from halfbyte.data.load import load_examples
from halfbyte.errors import HalfbyteError
from halfbyte.models.adapter_config import spec_from_adapter_config
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_names import iter_gguf_weights
from halfbyte.models.pickle_file import load_pickle
from halfbyte.models.safetensors_file import load_header
from halfbyte.models.source import resolve_source
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.quant import QuantSpec
from halfbyte.quant.bnb_format import export_state_dict, load_quantized

ADAPTER: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
CATASTROPHES = ("(a+)+$", "(a|a)*b", "((a*)b?)*", "(?:.*x)+", "(a|b){1,}", ".*.*.*.*.*.*.*x")
PATTERNS = (
    r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj",
    r".*\.(0|1|2)\.(.*_proj)",
    r"^(?!.*vision).*(q_proj|v_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp))",
    r"[*+(]q_proj\(\+",
)


def _safetensors(**fields: Any) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [float("inf")]},
        {"shape": [1.0]},
        {"shape": [True]},
        {"data_offsets": [0.0, 4.0]},
        {"shape": [0, 2**63], "data_offsets": [0, 0]},
    ],
)
def test_safetensors_numbers_are_whole_and_possible(fields: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_safetensors(**fields))
    with pytest.raises(HalfbyteError, match=r"x\.safetensors"):
        load_header(path)


@pytest.mark.parametrize("name", [5, None, "", "../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "*"])
def test_an_index_names_files_beside_it(name: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name, "b": "m.safetensors"}})
    )
    with pytest.raises(HalfbyteError, match=r"index\.json: weight_map"):
        resolve_source(tmp_path)


def test_an_index_of_a_name_too_long_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}})
    )
    with pytest.raises(HalfbyteError, match="weight_map"):
        resolve_source(tmp_path)


def _sharded(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))


def test_links_that_a_person_or_the_hub_cache_has_made_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "1234"
    _sharded(snapshot)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abcd").write_bytes(save({"a": torch.ones(1)}))
    (snapshot / "m.safetensors").symlink_to("../../blobs/abcd")
    assert len(resolve_source(snapshot).weight_files) == 1


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"quantization_config": 1}', '{"quantization_config": [1]}']
)
def test_config_json_that_python_cannot_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HalfbyteError, match=r"config\.json"):
        resolve_source(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": ["float16"]},
        {"nested_offset": "x"},
        {"nested_offset": [["x"]]},
        {"nested_offset": float("nan")},
        {"nested_offset": 10**40},
        {"blocksize": 64.0},
        {"shape": [True, 64]},
    ],
)
def test_bitsandbytes_state_of_wrong_types(fields: dict[str, Any]) -> None:
    tensors = export_state_dict("p", quantize_4bit(torch.randn(1, 64), QuantSpec(double_quant=True)))
    key = next(key for key in tensors if "quant_state" in key)
    state = json.loads(bytes(tensors[key].tolist())) | fields
    tensors[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(HalfbyteError, match="quant_state"):
        load_quantized("p", tensors)


def _gguf(fields: bytes, num_fields: int, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + fields + tensors + bytes(64)


def _gguf_field(key: bytes, value_type: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", value_type) + value


@pytest.mark.parametrize(
    "content",
    [
        _gguf(_gguf_field(b"general.alignment", 4, bytes(4)), 1),
        _gguf(_gguf_field(b"general.alignment", 6, struct.pack("<f", 32)), 1),
        _gguf(_gguf_field(b"x", 9, struct.pack("<IQ", 9, 1) * 5000), 1),
        _gguf(b"", 0, struct.pack("<QIIQ", 0, 0, 0, 0), 1),
        _gguf(b"", 0, struct.pack("<QIQIQ", 0, 1, 0, 0, 0), 1),
    ],
    ids=["alignment of nothing", "alignment no number", "arrays in arrays", "no dimensions", "a dimension of nothing"],
)
def test_gguf_headers_that_cannot_be(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(HalfbyteError, match=r"x\.gguf"):
        GgufFile(path)


def test_gguf_files_of_billions_of_layers(tmp_path: Path) -> None:
    name = struct.pack("<Q", 5) + b"llama"
    fields = _gguf_field(b"general.architecture", 8, name) + _gguf_field(b"llama.block_count", 10, b"\xff" * 8)
    (tmp_path / "x.gguf").write_bytes(_gguf(fields, 2))
    with pytest.raises(HalfbyteError, match="block_count"):
        next(iter_gguf_weights(GgufFile(tmp_path / "x.gguf")))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "["},
        {"target_modules": [1]},
        {"target_modules": {}},
        {"rank_pattern": {"(": 2}},
        {"r": float("inf")},
        {"layers_to_transform": 1, "layers_pattern": [1]},
        {"modules_to_save": [1]},
        *({"target_modules": pattern} for pattern in CATASTROPHES),
    ],
)
def test_adapter_config_of_impossible_values(fields: dict[str, Any]) -> None:
    with pytest.raises(HalfbyteError, match="adapter_config"):
        spec_from_adapter_config(ADAPTER | fields)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_name_layers_are_taken(pattern: str) -> None:
    assert spec_from_adapter_config(ADAPTER | {"target_modules": pattern}).targets == pattern


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"\x80\x02K", pickle.dumps({"a": 1})[:-3], b"\x80\x7b}q\x00."])
def test_pickles_that_make_no_sense(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(HalfbyteError, match=r"x\.bin"):
        load_pickle(tmp_path / "x.bin")


def test_a_pickle_that_is_a_bomb(tmp_path: Path) -> None:
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(100_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in source.infolist():
            packed.writestr(part.filename, source.read(part))
    with pytest.raises(HalfbyteError, match="is compressed"):
        load_pickle(tmp_path / "x.bin")


def test_a_cell_that_is_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f'messages\n"{DEEP}"\n')
    with pytest.raises(HalfbyteError, match="nested too deep"):
        load_examples(tmp_path / "x.csv")


DEEP, LONG = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.jsonl", '{"text": ' + DEEP),
        ("x.jsonl", '{"text": ' + LONG + "}"),
        ("x.json", "[" + DEEP),
        ("x.json", '[{"text": ' + LONG + "}]"),
        ("x.jsonl", '{"messages": [{}]}'),
        ("x.jsonl", '{"messages": [{"role": "user", "content": "x", "tool_calls": 0.5}]}'),
        ("x.jsonl", '{"messages": [{"role": "user", "content": "x"}], "tools": 7}'),
        ("x.csv", "a" * 100_000 + "\n1\n"),
    ],
)
def test_examples_that_python_cannot_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(HalfbyteError, match=name) as caught:
        load_examples(tmp_path / name)
    assert len(str(caught.value)) < 5000


BILLIONS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv", strict=True)
)


@pytest.mark.parametrize("text", [BILLIONS, "a: &a [*a]", "a: " + DEEP])
@pytest.mark.parametrize("read", [load_config, translate_file])
def test_yaml_that_stands_for_more_than_it_is(read: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(HalfbyteError, match=r"x\.yaml"):
        read(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "line",
    ["num_train_epochs: .nan", "cutoff_len: .inf", "save_steps: x", f"dataset_dir: {'x' * 5000}"],
)
def test_foreign_values_of_wrong_types(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ndataset: d\n{line}\n")
    with pytest.raises(HalfbyteError):
        translate_file(path).make_config()
