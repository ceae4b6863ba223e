"""What happens at steps: when to log, and what the person sees meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.train.interruption import Interruption
from halfbyte.train.saver import CheckpointSaver


class FlowCallback(TrainerCallback):
    """Decides, beside transformers' own, at which steps to log, to save and to stop.

    The first step and the last are logged whatever logging_steps is, and so is each checkpoint: that closes the window
    that a logged loss is the mean of, and a resumed run then logs the very same numbers. An interrupted run saves and
    stops after its step.

    What is to be saved after the last step of an epoch is saved after what else is due then: a run that goes on from
    that checkpoint begins the next epoch, and would leave out the evaluation.

    Args:
        interruption: Knows whether the run was asked to stop.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self._saves_at_epoch_end = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint brings its own; who continues a run may choose others.
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._is_cut(state):
            control.should_training_stop = control.should_save = True
        if _ends_epoch(state):
            self._saves_at_epoch_end, control.should_save = control.should_save, False
        if state.global_step == 1 or state.global_step >= state.max_steps or control.should_save:
            control.should_log = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._is_cut(state) and not _ends_epoch(state):
            control.should_save = control.should_evaluate = False
        control.should_save |= self._saves_at_epoch_end
        self._saves_at_epoch_end = False
        if control.should_save:
            control.should_log = True
        return control

    def _is_cut(self, state: TrainerState) -> bool:
        return self.interruption.signal is not None and state.global_step < state.max_steps


class SavingCallback(TrainerCallback):
    """Tells what came of checkpoints as soon as that is known.

    Args:
        saver: Writes them.
    """

    def __init__(self, saver: CheckpointSaver) -> None:
        self.saver = saver

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Loader workers are forked now, and a fork of a process with another thread at work may find its locks held.
        if args.dataloader_num_workers > 0:
            self.saver.wait()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saver.poll()


def has_saving_callback(callbacks: Iterable[TrainerCallback]) -> bool:
    """Say whether a callback does something with a checkpoint when it is saved, and so wants it to be there."""
    return any(type(callback).on_save is not TrainerCallback.on_save for callback in callbacks)


def _ends_epoch(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


class ProgressLine(TrainerCallback):
    """A bar on a terminal, plain lines elsewhere: loss, speed, memory, learning rate, time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._started = time.perf_counter()
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, figures="")
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        figures = (
            f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s "
            f"({logs['trained_tokens_per_second']:,.0f} trained)  {logs['memory_gib']:.1f} GiB  "
            f"lr {logs['learning_rate']:.2e}"
        )
        if self._progress is not None:
            self._progress.update(self._task, figures=figures)
        else:
            self.say(f"step {state.global_step}/{state.max_steps}  {figures}  {self._time_left(state)} left")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics and "eval_loss" in metrics:
            self.say(
                f"step {state.global_step}/{state.max_steps}  held-out loss {metrics['eval_loss']:.4f}, "
                f"perplexity {metrics['eval_perplexity']:.2f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; a run that ends early must not leave it turning."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        seconds = (time.perf_counter() - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        return format_seconds(seconds)


def format_seconds(seconds: float) -> str:
    """Return a duration as 0:42, 12:05 or 3:07:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def with_progress(
    callbacks: Sequence[TrainerCallback], args: TrainingArguments, *, is_heard: bool
) -> list[TrainerCallback]:
    """Add a progress line in place of transformers' own, unless there is one or none is wanted."""
    if not is_heard or args.disable_tqdm or any(isinstance(callback, ProgressLine) for callback in callbacks):
        return list(callbacks)
    return [*callbacks, ProgressLine(Console(stderr=True, highlight=False))]
