"""Files of examples, read row by row: JSONL, JSON, CSV, TSV, Parquet, plain text, each also compressed with gzip.

A row is yielded as soon as it is read, with the line it starts on, so that a mistake can be pointed at and a big file
never stands in memory as a tree of objects. JSON documents are the exception by nature: their text is read whole, their
rows are still decoded one at a time.

Everything is UTF-8, with or without a byte order mark. Guessing encodings would turn a wrong guess into training data,
so bytes that are not UTF-8 stop the run, with the place and the command that converts the file.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from halfbyte.data.examples import Row
from halfbyte.data.gzip_file import MAX_LINE_BYTES, open_gzip, read_gzip
from halfbyte.data.json_document import UNREADABLE_JSON, read_json_document, why_unreadable
from halfbyte.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_DELIMITERS = ",;\t|"
# Longer than any sensible field: Python's own limit of 131072 characters rejects long documents.
_MAX_FIELD_CHARACTERS = MAX_LINE_BYTES


def file_kind(path: Path) -> str:
    """Return the suffix that names the file's layout, in lower case and without the suffix of compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def iter_rows(path: Path, *, split: str = "train") -> Iterator[Row]:
    """Stream the rows of one file.

    Args:
        path: The file; its suffix says how to read it (see READERS).
        split: Which list to take from a JSON document that holds several, by its key.

    Raises:
        DataError: The file is empty, damaged, not UTF-8 or of an unknown kind.
    """
    reader = READERS.get(file_kind(path))
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"{path}: do not know how to read a file of this kind. Known: {known} (each also with .gz)")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty. Give a file that holds examples.")
        yield from reader(path, split)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}). Fetch or compress it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _read_jsonl(path: Path, split: str) -> Iterator[Row]:
    num_rows = 0
    with _open_binary(path) as stream:
        for line_number, raw in enumerate(stream, start=1):
            line = _decode_line(raw, path, line_number).strip()
            if not line:
                continue
            if num_rows == 0 and line.startswith("["):
                break
            yield Row(f"{path}:{line_number}", _decode_json_line(line, path, line_number))
            num_rows += 1
        else:
            return
    # Named .jsonl, but one list.
    yield from read_json_document(_read_text(path), path=path, split=split)


def _read_json(path: Path, split: str) -> Iterator[Row]:
    text = _read_text(path)
    head, _, rest = text.lstrip().partition("\n")
    if rest.strip() and head.startswith("{") and _is_json(head):
        # Named .json, but one object a line.
        yield from _read_jsonl(path, split)
        return
    yield from read_json_document(text, path=path, split=split)


def _read_csv(path: Path, split: str) -> Iterator[Row]:
    with _open_binary(path) as stream:
        header = _decode_line(stream.readline(), path, 1)
    unquoted = re.sub(r'"[^"]*"', "", header)
    delimiter = max(_DELIMITERS, key=unquoted.count)
    return _read_table(path, delimiter)


def _read_tsv(path: Path, split: str) -> Iterator[Row]:
    return _read_table(path, "\t")


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    previous_limit = csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = None
    try:
        with _open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
            # strict: without it a quote that is never closed swallows the rest of the file into one field.
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, path)
            first_line = reader.line_num + 1
            for values in reader:
                if values:
                    yield Row(f"{path}:{first_line}", _table_row(header, values, f"{path}:{first_line}"))
                first_line = reader.line_num + 1
    except UnicodeDecodeError:
        _raise_bad_encoding(path)
    except csv.Error as error:
        line_number = reader.line_num if reader is not None else 1
        raise DataError(
            f"{path}:{line_number}: broken quoting ({error}). A field that holds a quote must be quoted, with the "
            'quote doubled: "she said ""yes"""'
        ) from error
    finally:
        csv.field_size_limit(previous_limit)


def _read_parquet(path: Path, split: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'halfbyte[parquet]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        row_number = 0
        for batch in table.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                row_number += 1
                yield Row(f"{path}:{row_number}", fields)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Fetch or write it again.") from error


def _read_document(path: Path, split: str) -> Iterator[Row]:
    yield Row(f"{path}:1", {"text": _read_text(path)})


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    **dict.fromkeys(TEXT_SUFFIXES, _read_document),
}


def _open_binary(path: Path) -> BinaryIO:
    return open_gzip(path) if _is_packed(path) else path.open("rb")


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _read_text(path: Path) -> str:
    content = read_gzip(path) if _is_packed(path) else path.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode("utf-8-sig")
    _raise_bad_encoding(path)


def _decode_line(raw: bytes, path: Path, line_number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line_number == 1 else "utf-8")
    except UnicodeDecodeError:
        _raise_bad_encoding(path)


def _raise_bad_encoding(path: Path) -> NoReturn:
    """Find the first byte that is not UTF-8 and say where it is."""
    with _open_binary(path) as stream:
        start = stream.read(2)
        if start in _BYTE_ORDER_MARKS:
            encoding = _BYTE_ORDER_MARKS[start]
            raise DataError(f"{path}:1: the file is {encoding}, not UTF-8. {_conversion(path, encoding)}")
        stream.seek(0)
        for line_number, raw in enumerate(stream, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{path}:{line_number}: byte {error.start + 1} of the line (0x{raw[error.start]:02x})"
                advice = _conversion(path, "WINDOWS-1252")
                raise DataError(f"{where} is not UTF-8. If the file came from a spreadsheet: {advice}") from error
    raise DataError(f"{path}: ends in the middle of a UTF-8 character. Fetch or write the file again.")


def _conversion(path: Path, encoding: str) -> str:
    return f"Convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8_{path.name}"


def _decode_json_line(line: str, path: Path, line_number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line_number}: broken JSON at column {error.colno} ({error.msg}). Each line must be one whole "
            f"JSON object; mend or remove this line: {_excerpt(line)}"
        ) from error
    except UNREADABLE_JSON as error:
        raise DataError(f"{path}:{line_number}: {why_unreadable(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line_number}: holds a {type(value).__name__}. Each line must be one JSON object.")
    return value


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (json.JSONDecodeError, *UNREADABLE_JSON):
        return False
    return True


def _excerpt(line: str) -> str:
    return line if len(line) <= 80 else line[:77] + "..."


def _check_header(header: list[str], path: Path) -> None:
    if not any(header):
        raise DataError(f"{path}:1: the first line must name the columns, for example: prompt,completion")
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise DataError(f"{path}:1: two columns have the name {sorted(repeated)[0]!r}. Rename one of them.")


def _table_row(header: list[str], values: list[str], origin: str) -> dict[str, Any]:
    if len(values) != len(header):
        raise DataError(
            f"{origin}: {len(values)} fields where the first line names {len(header)} columns. A field that holds the "
            'separator or a line break must stand in quotes: "like, this"'
        )
    return dict(zip(header, values, strict=True))
