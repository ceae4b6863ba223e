"""Checkpoints: written whole or not at all, and enough to go on bit for bit.

A checkpoint-<step> folder holds the adapter in PEFT's files, the tokenizer, and what the next step depends on besides:

    optimizer.pt      moments and step counts
    scheduler.pt      position in the learning rate schedule
    random.pt         generators of python, numpy, torch's CPU and the GPU
    guard.pt          the running mean of losses
    scaler.pt         the loss scale, where fp16 has one
    trainer_state.json   transformers' own: step, epoch, log; the step is the place in the data
    run_state.json    fingerprints of data and base model, and more that a run may not be continued without
    run.yaml          the options of the run, where it was started from some
    manifest.json     size and checksum of all these, see `manifest`

It is written into a temporary folder beside, flushed to the disk and renamed, so that a crash leaves the old state or
the new one. Nothing in it is a pickle of code: all .pt files load under torch's weights-only loader.

Names of folders decide what is newer, never a clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from halfbyte.train.manifest import find_damage

OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE = "optimizer.pt", "scheduler.pt", "random.pt"
GUARD_FILE, SCALER_FILE = "guard.pt", "scaler.pt"
RUN_STATE_FILE = "run_state.json"
# What a person may have exchanged between two runs without an option saying so.
CHANGED = {
    "data": ("the training examples are", "the data, its template or the tokenizer has"),
    "base": ("the weights of the base model are", "its files have"),
}
# Not in the checkpoints of older releases, which are gone on with all the same.
KEPT_LATER = {"base"}


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(folder, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        remove_folder(folder)
        os.rename(temporary, folder)
        _flush_entry(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there; never so that a part of it stays under its name."""
    doomed = _beside(folder, "old")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a crash in the middle of writing or deleting a checkpoint has left in the folder of a run."""
    for leftover in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was made."""
    return int(checkpoint.name.partition("-")[2])


def remove_old_checkpoints(folder: Path, *, keep: int | None, spared: Collection[int]) -> None:
    """Delete all but the newest `keep` checkpoints, and never those of the steps in `spared`."""
    for path in list_checkpoints(folder)[: -keep if keep else 0]:
        if step_of(path) not in spared:
            remove_folder(path)


def best_step(log: Iterable[Mapping[str, Any]], steps: Collection[int]) -> int | None:
    """Return the one of `steps` after which the lowest held-out loss was logged, or None where it was for none."""
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"] in steps}
    return min(losses, key=lambda step: losses[step], default=None)


def find_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint of a run that is as it was written, or None where there is none.

    Damaged ones are told and renamed to checkpoint-<step>.damaged, so that they neither count as checkpoints nor are
    lost to whoever wants to look at them.
    """
    for path in reversed(list_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return path
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        tell(f"{path.name} is damaged: {damage}. It is {aside.name} now, and the one before it is used")
    return None


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


def check_run_state(checkpoint: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Make sure that a run goes on with what it was started with, and return all that its checkpoint says of it.

    Raises:
        ConfigError: It does not.
    """
    path = checkpoint / RUN_STATE_FILE
    if not path.exists():
        raise FormatError(f"{checkpoint} is not a whole checkpoint: {path.name} is missing")
    found = json.loads(path.read_text(encoding="utf-8"))
    unknown = KEPT_LATER - found.keys()
    different = [name for name, value in expected.items() if name not in unknown and found.get(name) != value]
    for what, (names, changed) in CHANGED.items():
        if what in different:
            raise ConfigError(
                f"{names} not those of the run that {checkpoint} belongs to: {changed} changed since. Put it back, "
                "begin anew with --overwrite, or name another folder"
            )
    if different:
        name = different[0]
        raise ConfigError(
            f"{checkpoint} belongs to a run with another {name} ({found.get(name)}, now {expected[name]}); resume with "
            "the same options and data, or start a new run"
        )
    return found


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{what}.tmp")


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
