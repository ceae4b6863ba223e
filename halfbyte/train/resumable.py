"""transformers.Trainer with our checkpoints: written beside the loop, checked before use, gone on from bit for bit."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from halfbyte.distributed import World
from halfbyte.errors import ConfigError, FormatError
from halfbyte.train import checkpoint as files
from halfbyte.train.batches import fingerprint_examples
from halfbyte.train.callbacks import ProgressLine, has_saving_callback
from halfbyte.train.guard import LossScaler, StepGuard
from halfbyte.train.interruption import Interruption
from halfbyte.train.manifest import find_damage
from halfbyte.train.meter import Meter
from halfbyte.train.options import TrainerOptions
from halfbyte.train.random_state import restore_random_state
from halfbyte.train.saver import CheckpointSaver
from halfbyte.train.snapshot import take_snapshot

OPTIMIZER_NUMBERS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


class ResumableTrainer(Trainer):
    """What a trainer needs to lose no work; `HalfbyteTrainer` is the one to use."""

    model: Any
    args: Any
    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    options: TrainerOptions
    notes: list[str]
    meter: Meter
    model_device: torch.device
    world: World
    scaler: LossScaler | None
    guard: StepGuard | None
    saver: CheckpointSaver
    interruption: Interruption

    def find_checkpoint(self, wanted: str | bool | None) -> str | None:
        """Return a checkpoint to go on from, every file of it as it was written.

        Args:
            wanted: A checkpoint, True for the newest that is whole, or nothing for none.

        Raises:
            ConfigError: There is none.
            FormatError: The one that was named is damaged.
        """
        if not wanted:
            return None
        if wanted is True:
            found = files.find_checkpoint(self.saver.folder, self.tell)
            if found is None:
                raise ConfigError(f"{self.saver.folder} holds no checkpoint to go on from; start the run anew")
            return str(found)
        damage = find_damage(Path(wanted))
        if damage is not None:
            raise FormatError(f"{wanted} is damaged: {damage}; go on from another checkpoint")
        return wanted

    def tell(self, text: str) -> None:
        """Say what happened beside what was planned: in the run's notes, and above the progress line."""
        self.notes.append(text)
        if not self.say(text):
            warnings.warn(text, stacklevel=2)

    def say(self, text: str) -> bool:
        """Print a line where there is a progress line, and return whether there is."""
        lines = [callback for callback in self.callback_handler.callbacks if isinstance(callback, ProgressLine)]
        for line in lines:
            line.say(text)
        return bool(lines)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        # transformers would take one step more from a checkpoint of the last one.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        self.saver.wait()
        # What the first has written is read by all.
        self.world.wait()
        return super()._finalize_training(*args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state = self.state
        if state.best_global_step:
            state.best_model_checkpoint = str(self.saver.folder / f"checkpoint-{state.best_global_step}")
        log, best_by_metric = list(state.log_history), state.best_global_step
        with self.meter.paused():
            if self.guard is not None:
                self.guard.finish()
            if not self.world.is_main:
                return
            self.saver.wait()
            snapshot = take_snapshot(
                self, run_state=self._run_state() | self._how(), config_text=self.options.config_text
            )
        self.saver.save(
            snapshot,
            keep=self.args.save_total_limit,
            choose_spared=lambda steps: {files.best_step(log, steps), best_by_metric},
        )
        if has_saving_callback(self.callback_handler.callbacks):
            self.saver.wait()

    def _run_state(self) -> dict[str, Any]:
        """Return what must be the same for a run to be continued."""
        return {
            "data": self._data_fingerprint,
            **({} if self.options.base_fingerprint is None else {"base": self.options.base_fingerprint}),
            "row_tokens": self.options.row_tokens,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            # Of all ranks together: n ranks take at once what one takes in n turns.
            "micro_batches_per_step": self.args.gradient_accumulation_steps * self.world.size,
            "seed": self.args.seed,
            "optim": str(getattr(self.args.optim, "value", self.args.optim)),
            # The optimizer's own state brings these along: others would be passed over in silence.
            **{name: getattr(self.args, name) for name in OPTIMIZER_NUMBERS},
        }

    def _how(self) -> dict[str, Any]:
        """Return what may be another when a run is continued, which then is not the same to the last bit."""
        return {"cpu_threads": torch.get_num_threads()} if self.model_device.type == "cpu" else {}

    @functools.cached_property
    def _data_fingerprint(self) -> str:
        return fingerprint_examples(self.train_dataset)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        before = files.check_run_state(Path(resume_from_checkpoint), self._run_state())
        self._compare_threads(before.get("cpu_threads"))
        files.restore_adapter_(self.model, Path(resume_from_checkpoint))

    def _compare_threads(self, before: Any) -> None:
        now = self._how().get("cpu_threads")
        if self.world.is_main and isinstance(before, int) and now is not None and before != now:
            self.tell(
                f"going on, but not bit for bit: {before} thread{'s' if before > 1 else ''} then, {now} now, which add "
                f"in another order; OMP_NUM_THREADS={before} makes it so"
            )

    def _load_best_model(self) -> None:
        files.restore_adapter_(self.model, Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(files.load_tensors(Path(checkpoint) / files.OPTIMIZER_FILE))
            self.lr_scheduler.load_state_dict(files.load_tensors(Path(checkpoint) / files.SCHEDULER_FILE))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.guard is not None:
            self.guard.load_state_dict(files.load_tensors(Path(checkpoint) / files.GUARD_FILE))
        if checkpoint is not None and self.scaler is not None:
            self.scaler.load_state_dict(files.load_tensors(Path(checkpoint) / files.SCALER_FILE))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = files.load_tensors(Path(checkpoint) / files.RANDOM_FILE)
            restore_random_state(state, self.model_device)
