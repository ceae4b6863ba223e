"""transformers' TensorBoard logger, in a form that a full disk does not end a run through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback


class PatientTensorBoard(TensorBoardCallback):
    """Loses what it cannot write, says so, and begins a new file at the next log.

    Args:
        folder: Where the logs go.
        tell: Is told of what could not be written.
    """

    def __init__(self, folder: str, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.logging_dir = folder
        self.tell = tell

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_end, *args, **kwargs)

    def _try(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except OSError as error:
            self.tb_writer = None
            self.tell(f"TensorBoard's logs could not be written: {error.strerror or error}; training goes on")


def make_patient(callback: TrainerCallback, folder: str, tell: Callable[[str], None]) -> TrainerCallback:
    """Return the callback, TensorBoard's in its patient form."""
    return PatientTensorBoard(folder, tell) if type(callback) is TensorBoardCallback else callback
