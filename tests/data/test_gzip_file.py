"""Gzip bombs: refused at the bound, in one message, whatever the bomb would have come to."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.data import gzip_file, readers
from halfbyte.data.readers import iter_rows
from halfbyte.errors import DataError

KIB = 1024


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_file, "MAX_LINE_BYTES", 512 * KIB)
    monkeypatch.setattr(gzip_file, "MAX_WHOLE_BYTES", 1024 * KIB)
    monkeypatch.setattr(readers, "_MAX_FIELD_CHARACTERS", 512 * KIB)


def pack(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


@pytest.mark.usefixtures("small_bounds")
@pytest.mark.parametrize("name", ["x.json.gz", "x.txt.gz", "x.md.gz", "X.TXT.GZ"])
def test_what_is_held_whole_is_bounded_as_a_whole(name: str, tmp_path: Path) -> None:
    lines = b"a line of text\n" * (2 * 1024 * KIB // 15)
    path = pack(tmp_path / name, lines)
    with pytest.raises(
        DataError, match=rf"{name}: unpacks to more than 1 MiB, .* \(gunzip {name}\), or write one JSON"
    ):
        list(iter_rows(path))


@pytest.mark.usefixtures("small_bounds")
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.ndjson.gz", "x.csv.gz", "x.tsv.gz"])
def test_line_without_end_is_refused(name: str, tmp_path: Path) -> None:
    path = pack(tmp_path / name, b'{"text": "' + b"a" * 1000 * KIB)
    with pytest.raises(DataError, match=r"unpacks to a line of more than 0 MiB"):
        list(iter_rows(path))


@pytest.mark.usefixtures("small_bounds")
def test_field_of_many_lines_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.csv.gz", b'text\n"' + b"line\n" * (1000 * KIB // 5) + b'"\n')
    with pytest.raises(DataError, match="field larger than field limit"):
        list(iter_rows(path))


@pytest.mark.usefixtures("small_bounds")
def test_rows_are_read_however_many_there_are(tmp_path: Path) -> None:
    """Lines end within a buffer, at its end, and beyond; together they are longer than any bound."""
    texts = ["a" * length for length in (1, 200 * KIB, 2**18 - 13, 2**18 - 12, 2**18 - 11, 300 * KIB, 500 * KIB, 7)] * 2
    path = pack(tmp_path / "x.jsonl.gz", b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
    assert [row.fields["text"] for row in iter_rows(path)] == texts


@pytest.mark.usefixtures("small_bounds")
def test_plain_files_are_bounded_by_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a" * 2048 * KIB)
    (row,) = iter_rows(tmp_path / "x.txt")
    assert len(row.fields["text"]) == 2048 * KIB


def test_bad_byte_in_a_gzip_file_is_still_found(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.jsonl.gz", b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"x.jsonl.gz:2: byte 11 of the line \(0xe9\)"):
        list(iter_rows(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz"])
def test_bomb_of_eight_gigabytes_takes_the_memory_of_its_bound(name: str, tmp_path: Path) -> None:
    """With the real bound, in a process that may not have more than 3 GiB."""
    path = tmp_path / name
    member = gzip.compress(b"a" * 2**26)
    path.write_bytes(gzip.compress(b'{"text": "') + member * 128)
    code = (
        f"from halfbyte.data.readers import iter_rows; from pathlib import Path; list(iter_rows(Path({str(path)!r})))"
    )
    limit = 3 * 2**30
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert "DataError: " in done.stderr
    assert "unpacks to a line of more than 256 MiB" in done.stderr
