"""A bound for programs that come with a model, such as its chat template: time and memory, whatever the program does.

Jinja's sandbox keeps a template from attributes and files, not from looping forever or from doubling a text forty
times. Counting in the interpreter of templates would miss what one call of a filter can do, so the process is bounded:

* **time**: of the processor, by a timer whose signal interrupts the main thread, where signals go. In other threads
  there is no bound of time, and one call into C (writing a value as JSON) is not interrupted: memory bounds those.
* **memory**: the address space may grow by so much and no further, as Linux counts it. Elsewhere there is no bound.

A template runs twice for each example, a tenth of a millisecond each time, so what stands around it is kept small.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType

from halfbyte.errors import DataError

# A conversation is rendered in less than a millisecond, the longest ones in some.
MAX_SECONDS = 10.0
MAX_EXTRA_BYTES = 1 << 29
STATUS = "/proc/self/statm"
# Within `bounds_kept` a descriptor of the file above; the handler of the timer is then in place, too.
_kept_status: ContextVar[int | None] = ContextVar("_kept_status", default=None)


class _TimeIsUpError(BaseException):
    """No Exception, so that what is interrupted does not take it for an error of its own."""


@contextlib.contextmanager
def bounded(what: str, *, seconds: float = MAX_SECONDS, extra_bytes: int = MAX_EXTRA_BYTES) -> Iterator[None]:
    """Run the body within bounds.

    Args:
        what: Runs, for the message.
        seconds: Of the processor, all threads together.
        extra_bytes: That the process may map beyond what it has.

    Raises:
        DataError: It took more, or called itself without end.
    """
    try:
        with _bounded_memory(extra_bytes), _bounded_time(seconds):
            yield
    except _TimeIsUpError:
        raise DataError(f"{what} was stopped after {seconds:g} s: it may never end") from None
    except MemoryError:
        raise DataError(f"{what} was stopped: it took more than {extra_bytes >> 20} MiB of memory") from None
    except RecursionError:
        raise DataError(f"{what} was stopped: it calls itself without end") from None


@contextlib.contextmanager
def bounds_kept() -> Iterator[None]:
    """Do once what bounds need, for all the programs that the body runs; each of them still has bounds of its own."""
    if sys.platform != "linux":
        yield
        return
    with _handler(), _status() as descriptor:
        token = _kept_status.set(descriptor)
        try:
            yield
        finally:
            _kept_status.reset(token)


@contextlib.contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    if not _is_timed():
        yield
        return
    with _handler() if _kept_status.get() is None else contextlib.nullcontext():
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextlib.contextmanager
def _handler() -> Iterator[None]:
    """Put the handler of the timer in place, where there is a timer."""
    if not _is_timed():
        yield
        return
    previous = signal.signal(signal.SIGVTALRM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGVTALRM, previous)


def _is_timed() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TimeIsUpError


@contextlib.contextmanager
def _bounded_memory(extra_bytes: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, _mapped_bytes() + extra_bytes) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _status() -> Iterator[int]:
    descriptor = os.open(STATUS, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mapped_bytes() -> int:
    kept = _kept_status.get()
    # Not by way of pathlib and a buffered file, which take four times as long.
    with _status() if kept is None else contextlib.nullcontext(kept) as descriptor:
        return int(os.pread(descriptor, 128, 0).split()[0]) * os.sysconf("SC_PAGE_SIZE")
