"""Stopping a run from outside: SIGTERM and Ctrl-C end it after the step in hand, with a checkpoint.

A second signal of either kind ends it at once, with what the last checkpoint holds.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from halfbyte.distributed import ALONE, World
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
    """Knows whether a run has been asked to stop.

    Signals reach several ranks at different steps. They stop together: at the end of the step in which they have told
    each other, see `hear`.

    Args:
        world: The ranks.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self.signal: signal.Signals | None = None
        """What all have been told to stop by."""
        self._noted: signal.Signals | None = None

    @property
    def was_noted(self) -> bool:
        """Whether this rank was told to stop."""
        return self._noted is not None

    def hear(self, *, was_noted: bool) -> None:
        """Stop after this step where any rank was told to; all ranks must hear the same."""
        if was_noted:
            self.signal = self._noted or signal.SIGTERM

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
        # A rank that ends has the others ended: only once the first has written.
        self.world.wait()
        saved = f"all that was done is in {saver.folder / f'checkpoint-{step}'}"
        if saver.failed_step is not None:
            saved = "what was done since the last checkpoint is lost, see above"
        command = f"halfbyte train {saver.folder / 'run.yaml'}"
        raise StoppedError(
            f"stopped by {self.signal.name} after step {step}; {saved}. Go on with the same command, or {command}",
            self.signal.value,
        )

    def _note(self, number: int, frame: Any) -> None:
        if self._noted is not None:
            raise KeyboardInterrupt
        self._noted = signal.Signals(number)
        if self.world.size == 1:
            self.signal = self._noted
