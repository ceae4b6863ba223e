"""Stopping a run from outside: SIGTERM and Ctrl-C end it after the step in hand, with a checkpoint.

A second signal of either kind ends it at once, with what the last checkpoint holds.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.train.saver import CheckpointSaver

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(HalfbyteError):
    """A run was ended by a signal before its last step.

    Args:
        message: What was saved, and how to go on.
        number: Of the signal.
    """

    label = ""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
        """By the custom of shells."""


class Interruption:
    """Knows whether a run has been asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of signals inside the `with` block, where Python lets this thread do so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_stop(self, step: int, saver: CheckpointSaver) -> None:
        """End a run that was asked to stop, after its checkpoint has been written.

        Raises:
            StoppedError: There was a signal.
        """
        if self.signal is None:
            return
        saved = f"all that was done is in {saver.folder / f'checkpoint-{step}'}"
        if saver.failed_step is not None:
            saved = "what was done since the last checkpoint is lost, see above"
        command = f"halfbyte train {saver.folder / 'run.yaml'}"
        raise StoppedError(
            f"stopped by {self.signal.name} after step {step}; {saved}. Go on with the same command, or {command}",
            self.signal.value,
        )

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
