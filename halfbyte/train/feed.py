"""Batches for the loop, also when the processes that prepare them die or hang.

A worker may be killed by the system for memory, or wait for a disk that does not answer. What it would have given is a
function of seed and epoch, so the process that trains prepares the same batches itself, to the end of the epoch.

torch tells of a dead worker by an exception from a handler of SIGCHLD, wherever training happens to be. The handler is
taken away: a loader that waits for a batch finds out by itself, within five seconds.
"""

from __future__ import annotations

import itertools
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from halfbyte.train.batches import Batch, EpochLoader

PATIENCE_SECONDS = 300
"""After so long without a batch a worker counts as hanging."""

DEATH_SECONDS = 5.0
"""A worker that has reset a connection is dead by then."""


class Feed:
    """Takes batches from the iterator of an epoch, or makes them anew.

    Args:
        build_loader: Makes the loader of the run, with this many workers.
        tell: Is told when workers are given up.
    """

    def __init__(self, build_loader: Callable[[int], EpochLoader], tell: Callable[[str], None]) -> None:
        self.build_loader, self.tell = build_loader, tell
        self.workers: Sequence[Any] = ()
        """Processes that prepare batches now."""
        self._given_up: Any = None
        self._own: Iterator[Batch] = iter(())

    def take(self, iterator: Iterator[Batch], count: int, *, epoch: int, place: int) -> list[Batch]:
        """Return the next batches; fewer where the epoch ends.

        Args:
            iterator: Over the rest of the epoch.
            count: How many.
            epoch: Its number.
            place: How many batches of the epoch came before.
        """
        if iterator is self._given_up:
            return list(itertools.islice(self._own, count))
        self.workers = getattr(iterator, "_workers", ())
        try:
            if self.workers:
                _let_deaths_be_found_by_the_loader()
            return list(itertools.islice(iterator, count))
        except (RuntimeError, OSError, EOFError) as error:
            if not self._is_of_workers(error):
                raise
            # One that hangs would be waited for at the end of this process.
            for worker in self.workers:
                worker.kill()
            self.tell(
                f"processes that prepare batches have failed ({error}); for the rest of the epoch the one that trains "
                "prepares them"
            )
        self._given_up, self._own = iterator, self._make(epoch, place)
        return list(itertools.islice(self._own, count))

    def _is_of_workers(self, error: Exception) -> bool:
        """Say whether a worker died or hangs, rather than that what it did went wrong."""
        if not self.workers:
            return False
        if isinstance(error, OSError | EOFError) and "DataLoader worker process" not in str(error):
            # A tensor that a worker has sent is fetched from that worker, by a connection that its death resets, some
            # moments before the death itself is known.
            return bool(multiprocessing.connection.wait([one.sentinel for one in self.workers], DEATH_SECONDS))
        return str(error).startswith("DataLoader ")

    def _make(self, epoch: int, place: int) -> Iterator[Batch]:
        loader = self.build_loader(0)
        loader.set_epoch(epoch)
        for indices in itertools.islice(loader.batch_sampler or (), place, None):
            yield loader.collate_fn([loader.dataset[index] for index in indices])


def _let_deaths_be_found_by_the_loader() -> None:
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    is_torch = getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
    if is_torch and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
