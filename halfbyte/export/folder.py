"""Output folders: written beside their place and moved there when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from halfbyte.errors import ConfigError


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder that becomes `path` if the block ends well, and vanishes otherwise.

    Args:
        path: What it shall be called. It may exist if it is empty.
        overwrite: Replace what is there.

    Raises:
        ConfigError: There is something at `path`, and nobody said to replace it; or it cannot be written to.
    """
    path = path.absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        what = "is a file" if path.is_file() else "exists and is not empty"
        raise ConfigError(f"{path} {what}; name another folder, or remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        _move(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.replace(temporary, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old)
