"""A bound for programs that come with a model, such as its chat template: time and memory, whatever the program does.

Jinja's sandbox keeps a template from attributes and files, not from looping forever or from doubling a text forty
times. Counting in the interpreter of templates would miss what one call of a filter can do, so the process is bounded:

* **time**: of the processor, by a timer whose signal interrupts the main thread, where signals go. In other threads
  there is no bound of time, and one call into C (writing a value as JSON) is not interrupted: memory bounds those.
* **memory**: the address space may grow by so much and no further, as Linux counts it. Elsewhere there is no bound.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from halfbyte.errors import DataError

# A conversation is rendered in less than a millisecond, the longest ones in some.
MAX_SECONDS = 10.0
MAX_EXTRA_BYTES = 1 << 29
STATUS = Path("/proc/self/statm")


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
def _bounded_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUpError

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@contextlib.contextmanager
def _bounded_memory(extra_bytes: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(STATUS.read_bytes().split()[0])
    bound = pages * os.sysconf("SC_PAGE_SIZE") + extra_bytes
    limits = [limit for limit in (soft, hard, bound) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
