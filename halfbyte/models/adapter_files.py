"""Adapters on disk, in PEFT's layout.

    adapter_config.json            see `adapter_config`
    adapter_model.safetensors      fp32, metadata {"format": "pt"}:
        base_model.model.<path>.lora_A.weight     (rank, in)
        base_model.model.<path>.lora_B.weight     (out, rank)
        base_model.model.<path>.<parameter>       of a module trained whole

Loading is strict. Every tensor must belong to a layer of the model, every layer that the configuration means must have
its two tensors, shapes must fit, and an adapter that changes nothing is an error: each of these, passed over in
silence, is an afternoon spent on a fine-tune that seems not to have worked.

Keys of other writers are recognised where what they mean is certain: an adapter's name in the middle (`.default.`),
the prefix missing or given twice, wrappers of whole modules.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.models.adapter_config import (
    CONFIG_FILE,
    adapter_config_text,
    make_adapter_config,
    read_adapter_config,
    spec_from_adapter_config,
)
from halfbyte.models.pickle_file import load_pickle
from halfbyte.models.safetensors_file import load_header
from halfbyte.nn import AdapterReport, Linear4bit, LoraLinear, LoraSpec, SavedModule, attach_adapters, iter_lora
from halfbyte.nn.attach import iter_saved, report_adapters
from halfbyte.nn.targets import find_saved, find_targets

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
SHOWN_NAMES = 3
_LORA_KEY = re.compile(r"(?P<path>.+)\.(?P<name>lora_[AB])(\.[^.]+)?\.weight")
_SAVED_KEY = re.compile(r"(?P<path>.+)\.modules_to_save\.[^.]+\.(?P<name>[^.]+)")
_UNSUPPORTED_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "adapters of embeddings",
    "lora_B.bias": "biases of adapters",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTensors:
    """The tensors of an adapter file by what they are, under paths of the model."""

    lora_A: dict[str, torch.Tensor]
    lora_B: dict[str, torch.Tensor]
    saved: dict[str, dict[str, torch.Tensor]]
    """Parameters of modules trained whole, by path and name."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter that fits a model."""

    spec: LoraSpec
    tensors: AdapterTensors
    alphas: dict[str, float]

    def scaling(self, path: str) -> float:
        """Return what the product of lora_B and lora_A of one layer is multiplied by."""
        rank = self.tensors.lora_A[path].shape[0]
        return self.alphas[path] / (math.sqrt(rank) if self.spec.rslora else rank)


def save_adapter(
    model: PreTrainedModel, folder: Path, *, base_model: str, spec: LoraSpec, revision: str | None = None
) -> None:
    """Write the adapters of a model as PEFT would.

    Args:
        model: One that has adapters.
        folder: Made if it is not there; files of the same name are replaced, each whole or not at all.
        base_model: Path or hub id of the base, for those who load the adapter.
        spec: What the adapters were made of.
        revision: Of the base, where it is a hub id.
    """
    text = describe_adapter(model, base_model=base_model, spec=spec, revision=revision)
    write_adapter(folder, adapter_state_dict(model), text)


def describe_adapter(model: PreTrainedModel, *, base_model: str, spec: LoraSpec, revision: str | None = None) -> str:
    """Return the text of adapter_config.json; arguments as for `save_adapter`."""
    adapted = [path for path, _ in iter_lora(model)]
    values = make_adapter_config(spec, base_model=base_model, adapted=adapted, model=model, revision=revision)
    return adapter_config_text(values)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], description: str) -> None:
    """Write an adapter's two files, each whole or not at all.

    Args:
        folder: Made if it is not there.
        tensors: As `adapter_state_dict` returns them.
        description: As `describe_adapter` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_FILE, save(dict(tensors), metadata={"format": "pt"}))
    _replace(folder / CONFIG_FILE, description.encode())


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapters of a model under PEFT's keys, fp32 on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in iter_lora(model):
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B
    for path, module in iter_saved(model):
        for name, parameter in module.trained.named_parameters():
            tensors[f"{PREFIX}{path}.{name}"] = parameter
    return {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in sorted(tensors.items())}


def load_adapter(model: PreTrainedModel, path: Path | str, *, trainable: bool = False) -> AdapterReport:
    """Put a saved adapter on a model.

    Args:
        model: The base, without adapters.
        path: The adapter's folder, or its weights file; a pickle is read only where the file itself is named.
        trainable: Whether training goes on; otherwise everything is frozen.

    Returns:
        How many layers got an adapter, and which.

    Raises:
        FormatError: The adapter is damaged, is for another model, or would have no effect.
        ConfigError: The model has adapters already.
    """
    if next(iter_lora(model), None) or next(iter_saved(model), None):
        raise ConfigError("the model has adapters already; load the base model anew to put others on it")
    adapter = open_adapter(model, path)
    attach_adapters(model, adapter.spec)
    _copy_into(model, adapter)
    for _, layer in iter_lora(model):
        layer.lora_A.requires_grad_(trainable)
        layer.lora_B.requires_grad_(trainable)
    for _, module in iter_saved(model):
        module.trained.requires_grad_(trainable)
    if not trainable:
        model.eval()
    return report_adapters(model)


def open_adapter(model: nn.Module, path: Path | str) -> Adapter:
    """Read an adapter and check that it fits `model`, which is left alone and may be on the meta device.

    Raises:
        FormatError: As for `load_adapter`.
    """
    weights_file = find_adapter_weights(Path(path))
    spec = spec_from_adapter_config(read_adapter_config(weights_file))
    tensors = _read_adapter(model, weights_file)
    _check_shapes(model, tensors, weights_file)
    _check_effect(tensors, weights_file)
    known = _known_part(model, spec, tensors, weights_file)
    alphas = {target.path: target.alpha for target in find_targets(model, known)} if tensors.lora_A else {}
    return Adapter(spec=known, tensors=tensors, alphas=alphas)


def find_adapter_weights(path: Path) -> Path:
    """Return the weights file of an adapter given by its folder or file.

    Raises:
        FormatError: There is none, or only a pickle that was not named.
    """
    if path.is_file():
        return path
    if path.is_dir():
        if (path / WEIGHTS_FILE).exists():
            return path / WEIGHTS_FILE
        if (path / PICKLE_FILE).exists():
            raise FormatError(
                f"{path} holds a pickled adapter only, and a pickle can run code; name the file itself if you trust "
                f"it: {path / PICKLE_FILE}"
            )
        raise FormatError(f"{path} holds no adapter: there is no {WEIGHTS_FILE}")
    if path.name == PICKLE_FILE and path.with_name(WEIGHTS_FILE).exists():
        return path.with_name(WEIGHTS_FILE)
    raise FormatError(f"adapter {path}: no such file or folder")


def _read_adapter(model: nn.Module, weights_file: Path) -> AdapterTensors:
    """Read an adapter's tensors, under paths of `model`.

    Raises:
        FormatError: The file is damaged, a tensor is of an unknown kind, or belongs to no layer of the model.
    """
    raw = _read_tensors(weights_file)
    if not raw:
        raise FormatError(f"{weights_file} holds no tensors")
    for key in raw:
        for mark, what in _UNSUPPORTED_KEYS.items():
            if mark in key:
                raise FormatError(f"{weights_file}: {key} belongs to {what}, which are not supported")
    parts = {key: _split_key(key) for key in raw}
    paths = _paths_in_model(model, {path for path, _ in parts.values()}, weights_file)
    found = AdapterTensors(lora_A={}, lora_B={}, saved={})
    matrices = {"lora_A": found.lora_A, "lora_B": found.lora_B}
    for key, tensor in raw.items():
        written, name = parts[key]
        path = paths[written]
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
        return load_file(weights_file)
    return load_pickle(weights_file)


def _split_key(key: str) -> tuple[str, str]:
    """Return the path of the layer, and `lora_A`, `lora_B` or the name of a parameter trained whole."""
    match = _LORA_KEY.fullmatch(key) or _SAVED_KEY.fullmatch(key)
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


def _check_shapes(model: nn.Module, tensors: AdapterTensors, weights_file: Path) -> None:
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
    for path, parameters in tensors.saved.items():
        wrong += _wrong_parameters(model.get_submodule(path), path, parameters)
    if wrong:
        raise FormatError(f"{weights_file} is for another model: {'; '.join(wrong[:SHOWN_NAMES])}")


def _wrong_parameters(module: nn.Module, path: str, parameters: Mapping[str, torch.Tensor]) -> list[str]:
    if isinstance(module, SavedModule):
        module = module.original
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if isinstance(module, Linear4bit):
        expected["weight"] = (module.out_features, module.in_features)
    wrong = [
        f"{path}.{name} {list(tensor.shape)} for {list(expected.get(name, ()))}"
        for name, tensor in parameters.items()
        if expected.get(name) != tuple(tensor.shape)
    ]
    return wrong + [f"{path}.{name} is missing" for name in expected.keys() - parameters.keys()]


def _check_effect(tensors: AdapterTensors, weights_file: Path) -> None:
    for path, matrix in (*tensors.lora_A.items(), *tensors.lora_B.items()):
        if not torch.isfinite(matrix).all():
            raise FormatError(f"{weights_file} is damaged: the adapter of {path} holds values that are not finite")
    has_update = any(bool(tensors.lora_B[path].any()) and bool(lora_A.any()) for path, lora_A in tensors.lora_A.items())
    if not has_update and not tensors.saved:
        raise FormatError(f"{weights_file} would have no effect: all its lora_B are zero, as before any training")


def _known_part(model: nn.Module, spec: LoraSpec, tensors: AdapterTensors, weights_file: Path) -> LoraSpec:
    """Return `spec` without names that no layer of this model has, after checking that the file holds what it means."""
    paths = [path for path, _ in model.named_modules()]
    targets = spec.targets
    if not isinstance(targets, str):
        # PEFT files often name layers of several families at once.
        targets = tuple(name for name in targets if any(p == name or p.endswith(f".{name}") for p in paths))
    adapted = tensors.lora_A.keys()
    known = dataclasses.replace(
        spec,
        targets=targets or tuple(sorted(adapted)),
        rank_pattern={key: rank for key, rank in spec.rank_pattern.items() if _matches_any(key, adapted)},
        alpha_pattern={key: alpha for key, alpha in spec.alpha_pattern.items() if _matches_any(key, adapted)},
    )
    meant = {target.path: target.rank for target in find_targets(model, known)} if adapted else {}
    differing = sorted(meant.keys() ^ adapted)
    if differing:
        side = "has tensors for" if differing[0] in adapted else "lacks the tensors of"
        raise FormatError(
            f"{weights_file} {side} {', '.join(differing[:SHOWN_NAMES])}, against what {CONFIG_FILE} says"
        )
    for path, rank in meant.items():
        if tensors.lora_A[path].shape[0] != rank:
            raise FormatError(
                f"{weights_file}: the adapter of {path} has rank {tensors.lora_A[path].shape[0]}, "
                f"{CONFIG_FILE} says {rank}"
            )
    saved = set(find_saved(model, known)) if known.modules_to_save else set()
    if saved != tensors.saved.keys():
        differing = sorted(saved ^ tensors.saved.keys())
        raise FormatError(f"{weights_file} and {CONFIG_FILE} disagree about {', '.join(differing[:SHOWN_NAMES])}")
    return known


def _matches_any(pattern: str, paths: Iterable[str]) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths)


@torch.no_grad()
def _copy_into(model: nn.Module, adapter: Adapter) -> None:
    tensors = adapter.tensors
    for path, layer in iter_lora(model):
        layer.lora_A.copy_(tensors.lora_A[path])
        layer.lora_B.copy_(tensors.lora_B[path])
    for path, module in iter_saved(model):
        for name, parameter in module.trained.named_parameters():
            parameter.copy_(tensors.saved[path][name])


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole, or leave the one that was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
