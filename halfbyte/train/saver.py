"""Checkpoints are written by a thread beside the loop: one at a time, and what came of it is always told.

A disk that is full, read-only or gone does not end a run: the checkpoint before stays, the run says what happened and
tries again at the next one. Any other error of the thread is a defect and is raised in the loop.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from halfbyte.errors import OutputError
from halfbyte.train.checkpoint import list_checkpoints, remove_old_checkpoints, step_of, write_folder
from halfbyte.train.snapshot import Snapshot, TokenizerFiles


class CheckpointSaver:
    """Writes the checkpoints of one run.

    Args:
        folder: Of the run; made anew if it is gone.
        tokenizer: Written into each.
        say: Is told of each checkpoint that was written, by the thread that trains.
        warn: Is told of each that was not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: TokenizerFiles,
        say: Callable[[str], object],
        warn: Callable[[str], None],
    ) -> None:
        self.folder, self.tokenizer, self.say, self.warn = folder, tokenizer, say, warn
        self.waited_seconds = 0.0
        """How long training stood still for a write before that had not ended."""
        self.failed_step: int | None = None
        """Of the last checkpoint, where it could not be written."""
        self._write_in_flight: Future[None] | None = None
        self._step = 0
        self._is_written = False

    def save(self, snapshot: Snapshot, *, keep: int | None, choose_spared: Callable[[set[int]], set[int]]) -> None:
        """Begin to write a checkpoint, after the one before has been written.

        Args:
            snapshot: The state of the run.
            keep: How many checkpoints, the newest, stay; None for all.
            choose_spared: Is given the steps of all checkpoints, and says which stay besides.
        """
        self.wait()
        job = functools.partial(self._write, snapshot, keep, choose_spared)
        self._step = snapshot.step
        # An interpreter that is about to end waits for the thread, and the thread ends with the checkpoint.
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"checkpoint-{snapshot.step}")
        self._write_in_flight = executor.submit(job)
        executor.shutdown(wait=False)

    def poll(self) -> None:
        """Tell what came of a write that has ended.

        Raises:
            Exception: It failed by a defect.
        """
        if self._write_in_flight is not None and self._write_in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written, and tell what came of it.

        Raises:
            Exception: It failed by a defect.
        """
        if self._write_in_flight is None:
            return
        write, self._write_in_flight = self._write_in_flight, None
        started = time.perf_counter()
        name, failure = f"checkpoint-{self._step}", None
        try:
            write.result()
        except OSError as error:
            failure = error
        finally:
            self.waited_seconds += time.perf_counter() - started
            self.failed_step = None if self._is_written else self._step
        if self._is_written:
            self.say(f"saved {name}")
        if failure is not None:
            what = "older ones could not be deleted" if self._is_written else "it could not be written"
            self.warn(f"{name}: {what}: {describe_failure(failure)}. {self._what_is_left()}")

    def _write(self, snapshot: Snapshot, keep: int | None, choose_spared: Callable[[set[int]], set[int]]) -> None:
        self._is_written = False
        with write_folder(self.folder / f"checkpoint-{snapshot.step}") as temporary:
            snapshot.write(temporary, self.tokenizer)
        self._is_written = True
        steps = {step_of(path) for path in list_checkpoints(self.folder)}
        remove_old_checkpoints(self.folder, keep=keep, spared=choose_spared(steps))

    def _what_is_left(self) -> str:
        last = [path.name for path in list_checkpoints(self.folder)]
        kept = f"{last[-1]} is kept" if last else "There is none before it"
        return f"{kept}; training goes on, and the next checkpoint is tried as usual"


@contextlib.contextmanager
def saying_what_is_left(folder: Path) -> Iterator[None]:
    """Turn a failure to write the results of a run into a message that says how to get them.

    Raises:
        OutputError: Something could not be written.
    """
    try:
        yield
    except OSError as error:
        checkpoints = [str(path) for path in list_checkpoints(folder)]
        start = f"from {checkpoints[-1]}" if checkpoints else "from the beginning, as there is no checkpoint"
        raise OutputError(
            f"the results of the run could not be written: {describe_failure(error)}. Mend that and give the same "
            f"command again: it goes on {start}"
        ) from error


def describe_failure(error: OSError) -> str:
    """Return what the system says, and of which file."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
