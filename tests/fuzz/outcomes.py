"""One damaged input and what comes of it: a result, or one of our errors, within its share of memory and time."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from halfbyte.errors import HalfbyteError

# Inputs are kilobytes. Reading one takes milliseconds; a busy machine is given hundreds of times that.
MAX_SECONDS = 5.0
# Far more than any input, far less than what a forged length or shape asks for.
MAX_EXTRA_BYTES = 512 << 20
_NO_MEMORY = ("memory", "Cannot allocate")


class OutOfBoundsError(AssertionError):
    """A reader took more memory or time than its input can justify."""


def outcome_of(read: Callable[[Path], object], folder: Path) -> str:
    """Return "result" or the name of the HalfbyteError that a reader ended with.

    Raises:
        OutOfBoundsError: It asked for too much memory, took too long, left a file behind, or hid lack of memory in an
            error of ours.
        Exception: Whatever else the reader raised, which is a defect.
    """
    before = sorted(folder.rglob("*"))
    start = time.process_time()
    try:
        with limited_memory():
            read(folder)
        outcome = "result"
    except HalfbyteError as error:
        if any(word in text for text in _chain(error) for word in _NO_MEMORY):
            raise OutOfBoundsError(f"memory was asked for before it was checked: {error}") from error
        _check_message(error)
        outcome = type(error).__name__
    if time.process_time() - start > MAX_SECONDS:
        raise OutOfBoundsError(f"took {time.process_time() - start:.1f} s")
    if sorted(folder.rglob("*")) != before:
        raise OutOfBoundsError("left files behind")
    return outcome


@contextlib.contextmanager
def limited_memory(extra_bytes: int = MAX_EXTRA_BYTES) -> Iterator[None]:
    """Let this process map no more than `extra_bytes` beyond what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _chain(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__


def _check_message(error: HalfbyteError) -> None:
    # A message longer than some screens is no message, whatever the file holds.
    if len(str(error)) > 20_000:
        raise OutOfBoundsError(f"a message of {len(str(error))} characters")
