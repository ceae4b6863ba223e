"""Checkpoints: written whole or not at all, and enough to go on bit for bit.

A checkpoint-<step> folder holds the adapter in PEFT's files, and what the next step depends on besides:

    optimizer.pt      moments and step counts
    scheduler.pt      position in the learning rate schedule
    random.pt         generators of python, numpy, torch's CPU and each GPU
    scaler.pt         the loss scale, where fp16 has one
    trainer_state.json   transformers' own: step, epoch, log; the step is the place in the data
    run_state.json    fingerprint of the data, so that a run is not continued on other data

It is written into a temporary folder beside, flushed to the disk and renamed, so that a crash leaves the old state or
the new one. Nothing in it is a pickle of code: all .pt files load under torch's weights-only loader.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.models.adapter_files import WEIGHTS_FILE
from halfbyte.models.adapter_tensors import PREFIX, adapter_key, halves
from halfbyte.models.adapter_tokens import rows_key
from halfbyte.nn import iter_lora
from halfbyte.nn.attach import iter_saved
from halfbyte.nn.vocabulary import iter_token_rows

OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE, SCALER_FILE = "optimizer.pt", "scheduler.pt", "random.pt", "scaler.pt"
RUN_STATE_FILE = "run_state.json"


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        _flush_entry(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def remove_old_checkpoints(folder: Path, *, keep: int | None, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints, and never the best."""
    for path in list_checkpoints(folder)[: -keep if keep else 0]:
        if best is None or path.resolve() != Path(best).resolve():
            shutil.rmtree(path)


def read_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every random number generator of a run on `device`, as plain numbers and tensors."""
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": [version, list(numbers), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every random number generator back.

    Raises:
        ConfigError: The run goes on on another kind of device, where dropout would draw other numbers.
    """
    if (state["cuda"] is not None) != (device.type == "cuda"):
        kind = "a CPU" if state["cuda"] is None else "a GPU"
        raise ConfigError(f"the checkpoint is of a run on {kind}; resume there, or start a new run from its adapter")
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = {**state["numpy"], "state": dict(state["numpy"]["state"])}
    numpy_state["state"]["key"] = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@torch.no_grad()
def restore_adapter_(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter of a checkpoint into the adapters that the model has.

    Unlike `load_adapter` this takes an adapter that has no effect yet, as after a first step of warmup.

    Raises:
        FormatError: It is damaged or of other layers.
    """
    path = folder / WEIGHTS_FILE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    found = _trained_halves(model, found, path)
    parameters = adapter_parameters(model)
    if {key: t.shape for key, t in found.items()} != {key: p.shape for key, p in parameters.items()}:
        raise FormatError(f"{path} holds the adapter of other layers than the model has; resume with the same options")
    for key, parameter in parameters.items():
        parameter.copy_(found[key])


def _trained_halves(model: nn.Module, found: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file without what the adapters have begun from, which the base must lack."""
    found = dict(found)
    for layer_path, layer in iter_lora(model):
        keys = adapter_key(layer_path, "lora_A"), adapter_key(layer_path, "lora_B")
        if layer.taken_A is None or layer.taken_B is None or not found.keys() >= set(keys):
            continue
        (A_RD, taken_A), (B_FR, taken_B) = halves(*(found[key] for key in keys))
        if not (torch.equal(taken_A, layer.taken_A.cpu()) and torch.equal(taken_B, layer.taken_B.cpu())):
            raise FormatError(
                f"{path} has begun from another part of {layer_path} than lora.init finds here: with other options, on "
                "another machine or by another release of torch; continue from it with lora.adapter instead"
            )
        found |= {keys[0]: A_RD, keys[1]: B_FR}
    return found


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of a model's adapters under its key in the adapter's file."""
    parameters: dict[str, nn.Parameter] = {}
    for path, layer in iter_lora(model):
        parameters |= {adapter_key(path, name): parameter for name, parameter in layer.adapter().items()}
    for path, module in iter_saved(model):
        parameters |= {f"{PREFIX}{path}.{name}": parameter for name, parameter in module.trained.named_parameters()}
    parameters |= {f"{PREFIX}{rows_key(path)}": wrapper.table.rows for path, wrapper in iter_token_rows(model)}
    return parameters


def load_tensors(path: Path) -> Any:
    """Load a .pt file of numbers and tensors.

    Raises:
        FormatError: It is missing, damaged or holds code.
    """
    if not path.exists():
        raise FormatError(f"{path.parent} is not a whole checkpoint: {path.name} is missing")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FormatError(f"{path} cannot be read as numbers and tensors: {error}") from error


def check_run_state(checkpoint: Path, expected: dict[str, Any]) -> None:
    """Make sure that a run goes on with what it was started with.

    Raises:
        ConfigError: It does not.
    """
    path = checkpoint / RUN_STATE_FILE
    if not path.exists():
        raise FormatError(f"{checkpoint} is not a whole checkpoint: {path.name} is missing")
    found = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name, value in expected.items() if found.get(name) != value]
    if different:
        name = different[0]
        raise ConfigError(
            f"{checkpoint} belongs to a run with another {name} ({found.get(name)}, now {expected[name]}); resume with "
            "the same options and data, or start a new run"
        )


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
