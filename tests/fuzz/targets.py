"""The readers, each with small valid files, what may be damaged in them, and how they are read."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import save

from halfbyte.config.foreign import translate_file
from halfbyte.config.load import load_config
from halfbyte.data.load import load_examples
from halfbyte.models.adapter_files import load_adapter, open_adapter, save_adapter
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_names import iter_gguf_weights, make_rope_parameters
from halfbyte.models.pickle_file import load_pickle
from halfbyte.models.safetensors_file import LENGTH_BYTES, MappedFile, load_header
from halfbyte.models.source import resolve_source
from halfbyte.models.weights import iter_weights
from halfbyte.nn import LoraSpec, attach_adapters, iter_lora
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.quant import QuantSpec
from halfbyte.quant.bnb_format import export_state_dict, load_quantized, quantized_prefixes
from tests.fuzz.mutations import NUMBERS, damage_bytes, damage_value
from tests.models.tiny import build_tiny
from tests.models.tiny_gguf import save_tiny_gguf

Damage = Callable[[random.Random, bytes], bytes]
EXAMPLES = Path(__file__).parents[1] / "config" / "examples"
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé", "weight": 1}], "id": 1},
    {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye", "tool_calls": []}]},
]
PAIRS = [{"prompt": "Where is it?", "completion": "On its way."}, {"prompt": "When?", "completion": "Soon."}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One reader."""

    files: Callable[[Path], None]
    """Writes the valid files into an empty folder."""
    damages: dict[str, tuple[Damage, ...]]
    """By file, how it may be damaged; one file at a time is."""
    read: Callable[[Path], object]
    """Reads everything that is in the folder."""


def damage_file(target: Target, rng: random.Random, valid: dict[str, bytes], folder: Path) -> None:
    """Write the valid files, one of them damaged."""
    name = rng.choice(sorted(target.damages))
    damage = rng.choice(target.damages[name])
    for other, content in valid.items():
        (folder / other).write_bytes(damage(rng, content) if other == name else content)


def _json(rng: random.Random, content: bytes) -> bytes:
    return json.dumps(damage_value(rng, json.loads(content))).encode()


def _json_lines(rng: random.Random, content: bytes) -> bytes:
    rows = damage_value(rng, [json.loads(line) for line in content.splitlines()])
    return "\n".join(json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])).encode()


def _yaml(rng: random.Random, content: bytes) -> bytes:
    # As aliases too: PyYAML writes what is the same object once.
    return yaml.safe_dump(damage_value(rng, yaml.safe_load(content))).encode("utf-8", "surrogatepass")


def _safetensors_header(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    header = _json(rng, content[LENGTH_BYTES : LENGTH_BYTES + length])
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + content[LENGTH_BYTES + length :]


def _bnb_state(rng: random.Random, content: bytes) -> bytes:
    """Damage the JSON in one of the tensors and write a consistent file around it."""
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
    header.pop("__metadata__", None)
    data = content[LENGTH_BYTES + length :]
    tensors: dict[str, bytes] = {name: data[slice(*fields["data_offsets"])] for name, fields in header.items()}
    state = next(name for name in tensors if "quant_state" in name)
    tensors[state] = _json(rng, tensors[state])
    header[state]["shape"] = [len(tensors[state])]
    position, out = 0, b""
    for name, raw in tensors.items():
        header[name]["data_offsets"] = [position, position + len(raw)]
        position, out = position + len(raw), out + raw
    raw_header = json.dumps(header).encode()
    return len(raw_header).to_bytes(LENGTH_BYTES, "little") + raw_header + out


def _gguf_field(rng: random.Random, content: bytes) -> bytes:
    """Overwrite the number behind a field's name and type, or those of a tensor's description."""
    names = list(re.finditer(rb"(llama|gemma3|general|blk|token_embd|rope_freqs)\.[a-z0-9_.]+", content))
    at = rng.choice(names).end() + rng.choice((0, 4, 4, 12, 20, 24))
    number = rng.choice(NUMBERS) & (2**64 - 1)
    width = rng.choice((4, 8))
    return content[:at] + number.to_bytes(8, "little")[:width] + content[at + width :]


def _gzipped(damage: Damage) -> Damage:
    return lambda rng, content: gzip.compress(damage(rng, gzip.decompress(content)), mtime=0)


# --- safetensors, the index, bitsandbytes ---


def _write_safetensors(folder: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 5), "b": torch.arange(7), "c": torch.zeros(2, 2, dtype=torch.bfloat16)}
    (folder / "x.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _read_safetensors(folder: Path) -> None:
    path = folder / "x.safetensors"
    header = load_header(path)
    if header.entries:
        mapped = MappedFile(path)
        for entry in header.entries:
            mapped.read(entry).clone()


def _write_model(folder: Path) -> None:
    shards = {"model-1.safetensors": {"a.weight": torch.ones(3)}, "model-2.safetensors": {"b.weight": torch.ones(4)}}
    for name, tensors in shards.items():
        (folder / name).write_bytes(save(tensors))
    places = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))


def _read_model(folder: Path) -> None:
    for _, tensor in iter_weights(resolve_source(folder)):
        tensor.read().clone()


def _write_bnb(folder: Path) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q = quantize_4bit(weight, QuantSpec(double_quant=True))
    (folder / "x.safetensors").write_bytes(save(export_state_dict("layer", q)))


def _read_bnb(folder: Path) -> None:
    path = folder / "x.safetensors"
    header = load_header(path)
    mapped = MappedFile(path) if header.entries else None
    tensors = {entry.name: mapped.read(entry).clone() for entry in header.entries if mapped is not None}
    for prefix in quantized_prefixes(tensors) or ["layer"]:
        load_quantized(prefix, tensors)


# --- GGUF ---


def _write_gguf(family: str, quantization: str, folder: Path) -> None:
    save_tiny_gguf(folder / "x.gguf", family, quantization=quantization)


def _read_gguf(folder: Path) -> None:
    file = GgufFile(folder / "x.gguf")
    for tensor in file.tensors.values():
        file.read(tensor).clone()
    for weight in iter_gguf_weights(file):
        weight.read()
    make_rope_parameters(file)


# --- adapters, pickles ---


@functools.cache
def _tiny_model() -> Any:
    return build_tiny("llama")


def _write_adapter(folder: Path) -> None:
    model = build_tiny("llama")
    spec = LoraSpec(rank=4, targets=("q_proj",), rank_pattern={"layers.1.self_attn.q_proj": 2})
    attach_adapters(model, spec)
    with torch.no_grad():
        for _, layer in iter_lora(model):
            layer.lora_B.fill_(0.5)
    save_adapter(model, folder, base_model="base", spec=spec)


def _read_adapter(folder: Path) -> None:
    model = _tiny_model()
    open_adapter(model, folder)
    # What fits is attached too, to a model of its own: that must not fail half way.
    load_adapter(build_tiny("llama"), folder)


def _write_pickle(is_zip: bool, folder: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 5), "b": torch.arange(7).half()}
    torch.save(tensors, folder / "x.bin", _use_new_zipfile_serialization=is_zip)


def _read_pickle(folder: Path) -> None:
    for tensor in load_pickle(folder / "x.bin").values():
        tensor.clone()


# --- examples ---


def _data_target(name: str, content: bytes, *damages: Damage) -> Target:
    return Target(
        files=lambda folder: _write(folder / name, content),
        damages={name: (damage_bytes, *damages)},
        read=lambda folder: load_examples(folder / name),
    )


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _parquet_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), sink)
    return bytes(sink.getvalue())


# --- options ---

RUN_YAML = b"""model:
  path: owner/name
data:
  train: x.jsonl
  columns: {prompt: ask, completion: say}
lora:
  rank: 16
  targets: [q_proj, v_proj]
  rank_pattern: {q_proj: 8}
train:
  learning_rate: 2e-4
  num_train_epochs: 3
output_dir: out
"""


def _yaml_target(name: str, content: bytes, read: Callable[[Path], object]) -> Target:
    return Target(
        files=lambda folder: _write(folder / name, content),
        damages={name: (damage_bytes, _yaml)},
        read=lambda folder: read(folder / name),
    )


def _translate(path: Path) -> None:
    translation = translate_file(path)
    translation.report()
    translation.to_yaml()
    translation.make_config()


def _translated(name: str) -> Target:
    return _yaml_target(name, (EXAMPLES / name).read_bytes(), _translate)


JSONL = "\n".join(map(json.dumps, ROWS)).encode()
TARGETS: dict[str, Target] = {
    "safetensors": Target(
        files=_write_safetensors,
        damages={"x.safetensors": (damage_bytes, _safetensors_header)},
        read=_read_safetensors,
    ),
    "model folder": Target(
        files=_write_model,
        damages={
            "config.json": (damage_bytes, _json),
            "model.safetensors.index.json": (damage_bytes, _json),
            "model-1.safetensors": (_safetensors_header,),
        },
        read=_read_model,
    ),
    "bitsandbytes": Target(
        files=_write_bnb, damages={"x.safetensors": (damage_bytes, _safetensors_header, _bnb_state)}, read=_read_bnb
    ),
    "gguf": Target(
        files=functools.partial(_write_gguf, "llama-stretched", "F32"),
        damages={"x.gguf": (damage_bytes, _gguf_field)},
        read=_read_gguf,
    ),
    "gguf, 8 bits": Target(
        files=functools.partial(_write_gguf, "gemma3", "Q8_0"),
        damages={"x.gguf": (damage_bytes, _gguf_field)},
        read=_read_gguf,
    ),
    "adapter": Target(
        files=_write_adapter,
        damages={
            "adapter_config.json": (damage_bytes, _json, _json),
            "adapter_model.safetensors": (damage_bytes, _safetensors_header),
        },
        read=_read_adapter,
    ),
    "pickle": Target(
        files=functools.partial(_write_pickle, True), damages={"x.bin": (damage_bytes,)}, read=_read_pickle
    ),
    "pickle, old": Target(
        files=functools.partial(_write_pickle, False), damages={"x.bin": (damage_bytes,)}, read=_read_pickle
    ),
    "jsonl": _data_target("x.jsonl", JSONL, _json_lines),
    "jsonl.gz": _data_target("x.jsonl.gz", gzip.compress(JSONL, mtime=0), _gzipped(_json_lines)),
    "json": _data_target("x.json", _json_bytes({"train": ROWS, "test": ROWS[:1]}), _json),
    "json list": _data_target("x.json", _json_bytes(PAIRS), _json),
    "csv": _data_target("x.csv", b'prompt,completion\n"Where, now?","On ""its"" way"\nWhen,Soon\n'),
    "csv of turns": _data_target(
        "x.csv", b"id;messages\n1;" + b'"' + _json_bytes(ROWS[0]["messages"]).replace(b'"', b'""') + b'"\n'
    ),
    "tsv": _data_target("x.tsv", b"instruction\tinput\toutput\nSay\t\tHi\n"),
    "parquet": _data_target("x.parquet", _parquet_bytes()),
    "text": _data_target("x.txt", "Über uns\n".encode() * 9),
    "run.yaml": _yaml_target("run.yaml", RUN_YAML, load_config),
    "axolotl": _translated("axolotl_tickets.yml"),
    "llama-factory": _translated("llama_factory_desk.yaml"),
}
