"""The tensors of an adapter's file: their keys, and whether they fit a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from halfbyte.errors import FormatError
from halfbyte.models.adapter_tokens import ROWS, TOKENS_KEY, WHOLE, TokenTensors
from halfbyte.models.pickle_file import load_pickle
from halfbyte.models.safetensors_file import load_header
from halfbyte.nn import Linear4bit, LoraLinear
from halfbyte.nn.vocabulary import find_vocabulary

PREFIX = "base_model.model."
# Metadata of a file whose ranks are two halves: what was trained, and less what it has begun from.
HALVES = {"halfbyte.ranks": "trained, begun from"}
SHOWN_NAMES = 3
_LORA_KEY = re.compile(r"(?P<path>.+)\.(?P<name>lora_[AB])(\.[^.]+)?\.weight")
_MAGNITUDE_KEY = re.compile(r"(?P<path>.+)\.(?P<name>lora_magnitude_vector)(\.[^.]+)?(\.weight)?")
_SAVED_KEY = re.compile(r"(?P<path>.+)\.modules_to_save\.[^.]+\.(?P<name>[^.]+)")
_ALONG_KEY = re.compile(r"^(.+)\.(?:original_module|modules_to_save)\.(?=[^.]+$)")
_UNSUPPORTED_KEYS = {
    "lora_embedding_": "adapters of embeddings",
    "lora_B.bias": "biases of adapters",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTensors:
    """The tensors of an adapter file by what they are, under paths of the model."""

    lora_A: dict[str, torch.Tensor]
    lora_B: dict[str, torch.Tensor]
    magnitude: dict[str, torch.Tensor]
    """Of DoRA; empty otherwise."""
    saved: dict[str, dict[str, torch.Tensor]]
    """Parameters of modules trained whole, by path and name."""
    tokens: TokenTensors = dataclasses.field(default_factory=TokenTensors)


def adapter_key(path: str, name: str) -> str:
    """Return PEFT's key for a parameter of the adapter of a layer."""
    return f"{PREFIX}{path}.{name}" + ("" if name == "lora_magnitude_vector" else ".weight")


def both_halves(masters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the adapter of a layer as one for the plain base, see `halfbyte.models.weight_splits`.

    Args:
        masters: As `LoraLinear.masters` gives them, or copies.
    """
    tensors = dict(masters)
    taken_A, taken_B = tensors.pop("taken_A", None), tensors.pop("taken_B", None)
    if taken_A is not None and taken_B is not None:
        tensors["lora_A"] = torch.cat([tensors["lora_A"], taken_A])
        tensors["lora_B"] = torch.cat([tensors["lora_B"], -taken_B], dim=1)
    return tensors


def halves(
    lora_A: torch.Tensor, lora_B: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return both halves of lora_A, and of lora_B: the inverse of `both_halves`."""
    (trained_A, taken_A), (trained_B, taken_B) = lora_A.chunk(2), lora_B.chunk(2, dim=1)
    return (trained_A, taken_A), (trained_B, -taken_B)


def read_adapter_tensors(model: nn.Module, weights_file: Path) -> AdapterTensors:
    """Read an adapter's tensors, under paths of `model`.

    Raises:
        FormatError: The file is damaged, a tensor is of an unknown kind, or belongs to no layer of the model.
    """
    raw = _read_tensors(weights_file)
    raw = {key: tensor for key, tensor in raw.items() if not _is_written_twice(key, raw)}
    if not raw:
        raise FormatError(f"{weights_file} holds no tensors")
    for key in raw:
        for mark, what in _UNSUPPORTED_KEYS.items():
            if mark in key:
                raise FormatError(f"{weights_file}: {key} belongs to {what}, which are not supported")
    parts = {key: _split_key(key) for key in raw}
    paths = _paths_in_model(model, {path for path, _ in parts.values()}, weights_file)
    found = AdapterTensors(lora_A={}, lora_B={}, magnitude={}, saved={})
    matrices = {"lora_A": found.lora_A, "lora_B": found.lora_B, "lora_magnitude_vector": found.magnitude}
    for key, tensor in raw.items():
        written, name = parts[key]
        path = paths[written]
        if name in (ROWS, WHOLE):
            {ROWS: found.tokens.rows, WHOLE: found.tokens.whole}[name][path] = tensor
            continue
        group, entry = (matrices[name], path) if name in matrices else (found.saved.setdefault(path, {}), name)
        if entry in group:
            raise FormatError(f"{weights_file} holds more than one adapter: two times {name} of {path}")
        group[entry] = tensor
    return found


def _read_tensors(weights_file: Path) -> dict[str, torch.Tensor]:
    with open(weights_file, "rb") as file:
        start = file.read(9)
    # Whatever its name: a safetensors header is an object, a pickle or its zip container is not.
    if weights_file.suffix == ".safetensors" or start[8:9] == b"{":
        load_header(weights_file)
        try:
            return load_file(weights_file)
        except SafetensorError as error:
            raise FormatError(f"{weights_file} is damaged: {error}") from error
    return load_pickle(weights_file)


def _is_written_twice(key: str, keys: Iterable[str]) -> bool:
    """Say whether PEFT wrote a tensor only because the vocabulary was made larger: base, or copy of another."""
    plain = _ALONG_KEY.sub(r"\1.", key)
    return plain != key and plain in keys


def _split_key(key: str) -> tuple[str, str]:
    """Return the path of the layer, and PEFT's name of an adapter's tensor or that of a parameter trained whole."""
    patterns = (_LORA_KEY, _MAGNITUDE_KEY, TOKENS_KEY, _SAVED_KEY)
    match = next((found for pattern in patterns if (found := pattern.fullmatch(key))), None)
    if match:
        return match["path"], match["name"]
    path, _, parameter = key.rpartition(".")
    return path, parameter


def _paths_in_model(model: nn.Module, written: set[str], weights_file: Path) -> dict[str, str]:
    """Return the model's path for each written one, by the first way of reading prefixes under which all are there."""
    modules = {path for path, _ in model.named_modules()}
    plain = {path: path.removeprefix(PREFIX) for path in written}
    ways = [
        plain,
        {path: inner.removeprefix("model.") for path, inner in plain.items()},
        {path: inner.removeprefix(PREFIX) for path, inner in plain.items()},
        {path: f"model.{inner}" for path, inner in plain.items()},
    ]
    for way in ways:
        if modules.issuperset(way.values()):
            return way
    unknown = sorted(inner for inner in plain.values() if inner not in modules)
    raise FormatError(
        f"{weights_file} is for another model: {len(unknown)} of its {len(plain)} layers are not in "
        f"{type(model).__name__}, such as {', '.join(unknown[:SHOWN_NAMES])}"
    )


def check_shapes(model: nn.Module, tensors: AdapterTensors, weights_file: Path) -> None:
    wrong = []
    for path in sorted(tensors.lora_A.keys() | tensors.lora_B.keys()):
        if path not in tensors.lora_A or path not in tensors.lora_B:
            raise FormatError(f"{weights_file} is incomplete: {path} has only one of lora_A and lora_B")
        layer = model.get_submodule(path)
        if not isinstance(layer, (nn.Linear, Linear4bit, LoraLinear)):
            raise FormatError(f"{weights_file}: {path} is a {type(layer).__name__}; only linear layers have adapters")
        lora_A, lora_B = tensors.lora_A[path], tensors.lora_B[path]
        rank = lora_A.shape[0]
        if lora_A.shape != (rank, layer.in_features) or lora_B.shape != (layer.out_features, rank):
            wrong.append(
                f"{path} (lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)} for a layer of "
                f"{layer.out_features} x {layer.in_features})"
            )
        magnitude = tensors.magnitude.get(path)
        if magnitude is not None and magnitude.shape != (layer.out_features,):
            wrong.append(f"{path} (lora_magnitude_vector {list(magnitude.shape)} for {layer.out_features} outputs)")
    for path, parameters in tensors.saved.items():
        wrong += _wrong_parameters(model, path, parameters)
    if wrong:
        raise FormatError(f"{weights_file} is for another model: {'; '.join(wrong[:SHOWN_NAMES])}")


def _wrong_parameters(model: nn.Module, path: str, parameters: Mapping[str, torch.Tensor]) -> list[str]:
    module = model.get_submodule(path)
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if isinstance(module, Linear4bit):
        expected["weight"] = (module.out_features, module.in_features)
    words = find_vocabulary(model)
    if words is not None and path in words.paths and "weight" in parameters:
        # Embedding and head may have become larger, by the rows of new tokens.
        expected["weight"] = (max(words.size, parameters["weight"].shape[0]), *expected["weight"][1:])
    wrong = [
        f"{path}.{name} {list(tensor.shape)} for {list(expected.get(name, ()))}"
        for name, tensor in parameters.items()
        if expected.get(name) != tuple(tensor.shape)
    ]
    return wrong + [f"{path}.{name} is missing" for name in expected.keys() - parameters.keys()]


def check_effect(tensors: AdapterTensors, weights_file: Path) -> None:
    for path, matrix in (*tensors.lora_A.items(), *tensors.lora_B.items(), *tensors.magnitude.items()):
        if not torch.isfinite(matrix).all():
            raise FormatError(f"{weights_file} is damaged: the adapter of {path} holds values that are not finite")
    has_update = any(bool(tensors.lora_B[path].any()) and bool(lora_A.any()) for path, lora_A in tensors.lora_A.items())
    if not has_update and not tensors.saved and not tensors.tokens.rows:
        raise FormatError(f"{weights_file} would have no effect: all its lora_B are zero, as before any training")
