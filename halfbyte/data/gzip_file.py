"""Gzip files from strangers: unpacked as they are read, and never into more memory than a bound.

A megabyte of gzip can hold a gigabyte of one character. What is read row by row may be as long as it likes, but its
lines are held one at a time, so a line is bounded; what is held whole (a JSON document, a plain text) is bounded as a
whole. The bounds are far above what data is like, and a file beyond them can be unpacked by hand: a plain file takes
the room on the disk that it takes in memory, and is bounded by nothing.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

from halfbyte.errors import DataError

MAX_LINE_BYTES = 2**28
MAX_WHOLE_BYTES = 2**30
PIECE_BYTES = 2**20


def open_gzip(path: Path) -> BinaryIO:
    """Open a file as the stream of its unpacked bytes; reading raises a DataError at a line that is too long."""
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path), 2**18))


def read_gzip(path: Path) -> bytes:
    """Return all that a file unpacks to.

    Raises:
        DataError: It is too much.
    """
    content = bytearray()
    with gzip.open(path, "rb") as stream:
        # In pieces, since a read of so many bytes takes memory for all of them at once.
        while piece := stream.read(PIECE_BYTES):
            content += piece
            if len(content) > MAX_WHOLE_BYTES:
                raise _too_much(
                    path, "more", MAX_WHOLE_BYTES, ", or write one JSON object a line (.jsonl.gz), which is streamed"
                )
    return bytes(content)


class _Unpacked(io.RawIOBase):
    """Unpacked bytes, with an eye on how long the line in hand has become."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = gzip.GzipFile(path, "rb")
        self._line_bytes = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        num_bytes = self._file.readinto(view)
        after_break = num_bytes - 1 - bytes(view[:num_bytes]).rfind(b"\n")
        self._line_bytes = after_break + (self._line_bytes if after_break == num_bytes else 0)
        if self._line_bytes > MAX_LINE_BYTES:
            raise _too_much(self._path, "a line of more", MAX_LINE_BYTES, "")
        return num_bytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._line_bytes = 0
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _too_much(path: Path, what: str, limit_bytes: int, way: str) -> DataError:
    return DataError(
        f"{path}: unpacks to {what} than {limit_bytes >> 20} MiB, which no sensible file does. If you trust it, unpack "
        f"it first (gunzip {path.name}){way}."
    )
