"""One process trains into a folder: it holds the folder for as long as it lives, however it ends.

The lock is the system's (flock on the folder itself), so that nothing is left behind by a process that was killed.
File systems without such locks are used without one. Processes that prepare batches inherit the lock and let go of it
some seconds after the one that trained has died, so a held folder is asked again for a while.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from halfbyte.errors import ConfigError

PATIENCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.2


def is_held(folder: Path) -> bool:
    """Say whether another process trains into an existing folder, after waiting for one that is about to end."""
    handle, is_locked = _lock(folder)
    _close(handle)
    return not is_locked


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold an existing folder inside the `with` block.

    Raises:
        ConfigError: Another process holds it.
    """
    handle, is_locked = _lock(folder)
    try:
        if not is_locked:
            raise ConfigError(f"another process is training into {folder}; wait for it, or name another folder")
        yield
    finally:
        _close(handle)


def _lock(folder: Path) -> tuple[int | None, bool]:
    """Return a handle of the folder, if the system gives one, and whether nobody else has it locked."""
    if os.name != "posix":
        return None, True
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return handle, False
            time.sleep(_PAUSE_SECONDS)
        except OSError:
            return handle, True
        else:
            return handle, True


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
