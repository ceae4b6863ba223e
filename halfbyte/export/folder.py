"""Output folders and files: written beside their place and moved there when they are whole."""

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


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the name of a file to write that becomes `path` if the block ends well, and vanishes otherwise.

    Args:
        path: What it shall be called.

    Raises:
        ConfigError: There is something at `path`, or its folder cannot be written to.
    """
    path = refuse_existing(path.absolute())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        refuse_existing(path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path) -> Path:
    """Return `path` unless something is there.

    Raises:
        ConfigError: Something is.
    """
    if path.exists():
        raise ConfigError(f"{path} exists; name another file, or remove it first")
    return path


def _move(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.replace(temporary, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old)
