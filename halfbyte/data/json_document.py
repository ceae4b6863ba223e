"""One JSON document that holds many rows: a list of them, or an object with such a list.

The text is in memory once; rows are decoded one after another from their position in it, so the whole document never
exists as Python objects (about seven times its text).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.data.examples import Row
from halfbyte.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
# Of names that a file gives, in a message; and how many of them.
_SHOWN_CHARACTERS, _SHOWN_NAMES = 80, 10
_DECODER = json.JSONDecoder()
# Nesting by the thousand; whole numbers of thousands of digits.
UNREADABLE_JSON = (RecursionError, ValueError)
_ROW_KEYS = ("messages", "conversations", "conversation", "turns", "instances")


class _Item(NamedTuple):
    begin: int
    end: int
    value: Any


def read_json_document(text: str, *, path: Path, split: str) -> Iterator[Row]:
    """Stream the rows of a JSON document.

    Args:
        text: The document.
        path: Its file, for messages.
        split: The key to take where an object holds several lists of rows.

    Raises:
        DataError: Broken JSON, or no list of rows in it.
    """
    start = _skip(text, 0)
    if start == len(text):
        raise DataError(f"{path}: the file holds only white space. Give a file that holds examples.")
    try:
        if text[start] == "[":
            end = yield from _list_rows(text, start, path)
            _check_end(text, end)
        elif text[start] == "{":
            yield from _object_rows(text, start, path, split)
        else:
            raise DataError(f"{path}:1: must hold a list of rows or an object with such a list.")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}).") from error
    except UNREADABLE_JSON as error:
        raise DataError(f"{path}: {why_unreadable(error)}") from error


def why_unreadable(error: BaseException) -> str:
    """Say what Python's JSON reader stumbled over in JSON that is not broken."""
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep to be read. Remove that row."
    return f"JSON that cannot be read ({error}). Remove that row."


def _list_rows(text: str, start: int, path: Path) -> Generator[Row, None, int]:
    """Yield the rows of the list that starts here; return where the list ends."""
    line_number, counted_to, end = 1, 0, start + 1
    for item in _iter_list(text, start):
        line_number += text.count("\n", counted_to, item.begin)
        counted_to = item.begin
        origin = f"{path}:{line_number}"
        if not isinstance(item.value, dict):
            raise DataError(f"{origin}: the list holds a {type(item.value).__name__}. Each row must be a JSON object.")
        yield Row(origin, item.value)
        end = item.end
    return _skip(text, end) + 1


def _object_rows(text: str, start: int, path: Path, split: str) -> Iterator[Row]:
    """Find the list of rows among the object's values; an object that is a row itself is the only row."""
    lists: dict[str, int] = {}
    position = _skip(text, start + 1)
    while not text.startswith("}", position):
        if not text.startswith('"', position):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        key, position = _DECODER.raw_decode(text, position)
        position = _expect(text, position, ":")
        if _starts_list_of_objects(text, position):
            lists[key] = position
            position = _end_of_list(text, position)
        else:
            _, position = _DECODER.raw_decode(text, position)
        position = _skip(text, position)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("}", position):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    _check_end(text, position + 1)
    if not lists or any(key in _ROW_KEYS for key in lists):
        value, _ = _DECODER.raw_decode(text, start)
        yield Row(f"{path}:1", value)
        return
    chosen = split if split in lists else next(iter(lists))
    if len(lists) > 1 and split not in lists:
        names = ", ".join(name[:_SHOWN_CHARACTERS] for name in itertools.islice(lists, _SHOWN_NAMES))
        raise DataError(
            f"{path}: holds several lists of rows ({names}). Name the one to use, for example "
            f"--data.split={chosen[:_SHOWN_CHARACTERS]}"
        )
    yield from _list_rows(text, lists[chosen], path)


def _iter_list(text: str, start: int) -> Iterator[_Item]:
    position = _skip(text, start + 1)
    while not text.startswith("]", position):
        value, end = _DECODER.raw_decode(text, position)
        yield _Item(position, end, value)
        position = _skip(text, end)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def _end_of_list(text: str, start: int) -> int:
    end = start + 1
    for item in _iter_list(text, start):
        end = item.end
    return _skip(text, end) + 1


def _check_end(text: str, position: int) -> None:
    if _skip(text, position) != len(text):
        raise json.JSONDecodeError("Extra data", text, _skip(text, position))


def _starts_list_of_objects(text: str, position: int) -> bool:
    return text.startswith("[", position) and text.startswith("{", _skip(text, position + 1))


def _expect(text: str, position: int, symbol: str) -> int:
    position = _skip(text, position)
    if not text.startswith(symbol, position):
        raise json.JSONDecodeError(f"Expecting '{symbol}' delimiter", text, position)
    return _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "the pattern matches nothing at least"
    return match.end()
