"""The state of a run at one step, copied into host memory: training goes on while it is written.

Copying takes what a pass over adapters and optimizer state takes, milliseconds. Serialising, checksums and waiting for
the disk come after, in another thread, and touch nothing that training changes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from halfbyte.memory.host_copy import copy_to_host
from halfbyte.models.adapter_files import AdapterContent, pack_adapter
from halfbyte.optim.adamw import FlatAdamW
from halfbyte.train.checkpoint import (
    GUARD_FILE,
    OPTIMIZER_FILE,
    RANDOM_FILE,
    RUN_STATE_FILE,
    SCALER_FILE,
    SCHEDULER_FILE,
)
from halfbyte.train.manifest import write_manifest
from halfbyte.train.random_state import read_random_state


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What a checkpoint is written from. Nothing in it is shared with the run."""

    step: int
    adapter: AdapterContent
    states: Mapping[str, Any]
    """Numbers and tensors by name of their .pt file."""
    documents: Mapping[str, Any]
    """What JSON files say, by name."""
    texts: Mapping[str, str]
    """Other text files by name."""

    def write(self, folder: Path, tokenizer: TokenizerFiles) -> None:
        """Write all files of the checkpoint, its manifest last."""
        tokenizer.write(folder)
        self.adapter.write(folder)
        for name, state in self.states.items():
            (folder / name).write_bytes(_serialise(state))
        texts = {**self.texts, **{name: _as_json(said) for name, said in self.documents.items()}}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_manifest(folder)


class TokenizerFiles:
    """The files of a tokenizer, made once: large vocabularies take a second to serialise, and training changes none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._contents: dict[str, bytes] | None = None

    def prepare(self) -> dict[str, bytes]:
        """Return the files' contents by name, made at the first call."""
        if self._contents is None:
            self._contents = self._make()
        return self._contents

    def write(self, folder: Path) -> None:
        """Write the files, as `save_pretrained` does."""
        for name, content in self.prepare().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def _make(self) -> dict[str, bytes]:
        if self.tokenizer is None:
            return {}
        with tempfile.TemporaryDirectory() as name:
            self.tokenizer.save_pretrained(name)
            paths = [path for path in Path(name).rglob("*") if path.is_file()]
            return {str(path.relative_to(name)): path.read_bytes() for path in paths}


def take_snapshot(trainer: Any, *, run_state: Mapping[str, Any], config_text: str | None) -> Snapshot:
    """Copy the state of a HalfbyteTrainer after a step.

    Args:
        trainer: Between two steps.
        run_state: What must be the same for the run to be continued.
        config_text: Of run.yaml, where there is one.
    """
    state = trainer.state
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    states = {
        SCHEDULER_FILE: trainer.lr_scheduler.state_dict(),
        RANDOM_FILE: read_random_state(trainer.model_device),
    }
    if trainer.guard is not None:
        states[GUARD_FILE] = trainer.guard.state_dict()
    if trainer.scaler is not None:
        states[SCALER_FILE] = trainer.scaler.state_dict()
    return Snapshot(
        step=state.global_step,
        adapter=pack_adapter(trainer.model, base_model=trainer.base_model, spec=trainer.lora),
        states={OPTIMIZER_FILE: _copy_optimizer(trainer.optimizer), **copy_to_host(states)},
        # Not as texts: of the log of a long run that takes longer than all else here.
        documents=copy_to_host({RUN_STATE_FILE: run_state, TRAINER_STATE_NAME: fields}),
        texts={} if config_text is None else {"run.yaml": config_text},
    )


def _copy_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimizer, which may be in accelerate's wrapper."""
    state: dict[str, Any] = optimizer.state_dict()
    # Any other hands out its own tensors.
    is_copied = isinstance(getattr(optimizer, "optimizer", optimizer), FlatAdamW)
    return state if is_copied else copy_to_host(state)


def _as_json(said: Any) -> str:
    return json.dumps(said, indent=2, sort_keys=True) + "\n"


def _serialise(state: Any) -> memoryview:
    # torch's own writer of files turns a full disk into an error that does not say so.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()
