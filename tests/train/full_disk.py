"""Files that cannot grow: to whoever writes, a full disk."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def files_up_to(limit_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, for the length of a block within one test.

    Not a fixture: pytest prints a test's result before its fixtures end, and what it prints may go to a longer file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
