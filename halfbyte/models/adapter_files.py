"""Adapters on disk, in PEFT's layout.

    adapter_config.json            see `adapter_config`
    adapter_model.safetensors      fp32, metadata {"format": "pt"}:
        base_model.model.<path>.lora_A.weight     (rank, in)
        base_model.model.<path>.lora_B.weight     (out, rank)
        base_model.model.<path>.lora_magnitude_vector   (out,), with DoRA
        base_model.model.<path>.<parameter>       of a module trained whole
        base_model.model.<path>.token_adapter...  rows of single tokens, see `adapter_tokens`

Loading is strict. Every tensor must belong to a layer of the model, every layer that the configuration means must have
its tensors, shapes must fit, and an adapter that changes nothing is an error: each of these, passed over in
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
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.memory.host_copy import copy_to_host
from halfbyte.models.adapter_config import (
    CONFIG_FILE,
    adapter_config_text,
    make_adapter_config,
    read_adapter_config,
    spec_from_adapter_config,
)
from halfbyte.models.adapter_tensors import (
    HALVES,
    PREFIX,
    SHOWN_NAMES,
    AdapterTensors,
    adapter_key,
    both_halves,
    check_effect,
    check_shapes,
    read_adapter_tensors,
)
from halfbyte.models.adapter_tokens import KnownRows, copy_rows_, rows_key, settle_tokens
from halfbyte.nn import AdapterReport, LoraSpec, attach_adapters, iter_lora
from halfbyte.nn.adapter_shelf import (
    DEFAULT_NAME,
    active_adapter,
    adapter_names,
    name_adapter,
    set_adapter,
    take_off_adapter,
)
from halfbyte.nn.attach import AdapterModules, iter_saved, report_adapters
from halfbyte.nn.split import Split
from halfbyte.nn.targets import find_saved, find_targets
from halfbyte.nn.vocabulary import iter_token_rows

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter that fits a model."""

    spec: LoraSpec
    tensors: AdapterTensors
    alphas: dict[str, float]
    rows: dict[str, KnownRows] = dataclasses.field(default_factory=dict)
    """Trained rows of single tokens, by the path of embedding or head."""

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
    pack_adapter(model, base_model=base_model, spec=spec, revision=revision).write(folder)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterContent:
    """What an adapter's files are written from."""

    tensors: Mapping[str, torch.Tensor]
    """Under PEFT's keys, fp32 on the CPU."""
    description: str
    """Of adapter_config.json."""
    metadata: Mapping[str, str]
    """Of the weights' file."""

    def write(self, folder: Path) -> None:
        """Write both files, each whole or not at all, into a folder that is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS_FILE, save(dict(self.tensors), metadata=dict(self.metadata)))
        _replace(folder / CONFIG_FILE, self.description.encode())


def pack_adapter(
    model: PreTrainedModel, *, base_model: str, spec: LoraSpec, revision: str | None = None
) -> AdapterContent:
    """Return copies of the adapters of a model as PEFT would write them; arguments as for `save_adapter`."""
    modules = AdapterModules.of(model)
    is_split = any(layer.taken_A is not None for layer in modules.lora.values())
    if is_split:
        spec = spec.with_ranks_times(2)
    values = make_adapter_config(spec, base_model=base_model, modules=modules, model=model, revision=revision)
    return AdapterContent(
        tensors=copy_adapter(modules),
        description=adapter_config_text(values),
        metadata={"format": "pt", **(HALVES if is_split else {})},
    )


def copy_adapter(modules: AdapterModules) -> dict[str, torch.Tensor]:
    """Return copies of a model's adapters, as those of a plain base, under PEFT's keys, fp32 on the CPU."""
    lora = {path: layer.masters() for path, layer in modules.lora.items()}
    whole = {
        f"{PREFIX}{path}.{name}": parameter
        for path, module in modules.saved.items()
        for name, parameter in module.trained.named_parameters()
    }
    rows = {f"{PREFIX}{rows_key(path)}": wrapper.table.rows for path, wrapper in modules.rows.items()}
    lora, others = copy_to_host((lora, whole | rows))
    tensors = {
        adapter_key(path, name): tensor for path, copies in lora.items() for name, tensor in both_halves(copies).items()
    }
    return {key: tensor.float() for key, tensor in sorted((tensors | others).items())}


def load_adapter(
    model: PreTrainedModel,
    path: Path | str,
    *,
    name: str = DEFAULT_NAME,
    trainable: bool = False,
    splits: Mapping[str, Split] | None = None,
) -> AdapterReport:
    """Put a saved adapter on a model.

    Args:
        model: The base. Where it has adapters already, the new one is put beside them, and the one in use stays in
            use until `set_adapter`.
        name: What the adapter is called from then on.
        path: The adapter's folder, or its weights file; a pickle is read only where the file itself is named.
        trainable: Whether training goes on; otherwise everything is frozen.
        splits: Where what the adapter has begun from was taken out of the model's weights as they were loaded (see
            `weight_splits`), what they were split into: the first values are then the adapter's.

    Returns:
        How many layers got an adapter, and which.

    Raises:
        FormatError: The adapter is damaged, is for another model, or would have no effect.
        ConfigError: The model has an adapter of that name already.
    """
    if name in adapter_names(model):
        raise ConfigError(f"the model has adapters already, one of them named {name!r}; give another name")
    in_use, training = active_adapter(model), model.training
    take_off_adapter(model)
    try:
        adapter = open_adapter(model, path)
        if splits:
            attach_adapters(model, adapter.spec.with_ranks_times(0.5), splits)
            _copy_saved(model, adapter)
        else:
            attach_adapters(model, adapter.spec)
            _copy_into(model, adapter)
        name_adapter(model, name, adapter.spec)
        report = _settle_adapter(model, trainable=trainable)
    finally:
        if in_use is not None:
            set_adapter(model, in_use)
            model.train(training)
    return report


def _settle_adapter(model: PreTrainedModel, *, trainable: bool) -> AdapterReport:
    """Make the adapter in use one to train or one to use, and say what it is."""
    for _, layer in iter_lora(model):
        for parameter in layer.adapter().values():
            parameter.requires_grad_(trainable)
    for _, module in iter_saved(model):
        module.trained.requires_grad_(trainable)
    for _, wrapper in iter_token_rows(model):
        wrapper.table.rows.requires_grad_(trainable)
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
    tensors = read_adapter_tensors(model, weights_file)
    spec, rows = settle_tokens(model, spec, tensors.tokens, tensors.saved, weights_file)
    check_shapes(model, tensors, weights_file)
    check_effect(tensors, weights_file)
    known = _known_part(model, spec, tensors, weights_file)
    alphas = {target.path: target.alpha for target in find_targets(model, known)} if tensors.lora_A else {}
    return Adapter(spec=known, tensors=tensors, alphas=alphas, rows=rows)


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


def _known_part(model: nn.Module, spec: LoraSpec, tensors: AdapterTensors, weights_file: Path) -> LoraSpec:
    """Return `spec` without names that no layer of this model has, after checking that the file holds what it means."""
    paths = [path for path, _ in model.named_modules()]
    targets = spec.targets
    if not isinstance(targets, str):
        # PEFT files often name layers of several families at once.
        targets = tuple(name for name in targets if any(p == name or p.endswith(f".{name}") for p in paths))
    adapted = tensors.lora_A.keys()
    if tensors.magnitude.keys() != (adapted if spec.dora else set()):
        found = f"{len(tensors.magnitude)} magnitudes for {len(adapted)} adapters"
        raise FormatError(f"{weights_file} has {found}, and {CONFIG_FILE} says use_dora {str(spec.dora).lower()}")
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
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.copy_(tensors.magnitude[path])
    _copy_saved(model, adapter)


@torch.no_grad()
def _copy_saved(model: nn.Module, adapter: Adapter) -> None:
    for path, module in iter_saved(model):
        for name, parameter in module.trained.named_parameters():
            parameter.copy_(adapter.tensors.saved[path][name])
    copy_rows_(model, adapter.rows)


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
