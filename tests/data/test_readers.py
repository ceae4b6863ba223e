"""Every kind of file, and every way in which a file can be broken."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from halfbyte.data.readers import file_kind, iter_rows
from halfbyte.errors import DataError

ROWS = [
    {"prompt": "Where is my order?", "completion": "On its way,\nand soon there."},
    {"prompt": 'Is "blue" in stock?', "completion": "Caf\u00e9 \U0001f600"},
]


def write_rows(path: Path, *, encoding: str = "utf-8") -> Path:
    """Write ROWS in the layout that the file's name asks for."""
    kind = file_kind(path)
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    if kind in (".csv", ".tsv"):
        lines = path.with_name("table.tmp")
        with lines.open("w", encoding=encoding, newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
        data = lines.read_bytes()
    elif kind == ".json":
        data = json.dumps(ROWS, indent=1, ensure_ascii=False).encode(encoding)
    else:
        data = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "A.JSONL", "a.jsonl.gz", "a.csv.gz"]
)
def test_iter_rows_reads_every_kind(tmp_path: Path, name: str, encoding: str) -> None:
    rows = list(iter_rows(write_rows(tmp_path / name, encoding=encoding)))
    assert [row.fields for row in rows] == ROWS


def test_iter_rows_names_the_line_a_row_starts_on(tmp_path: Path) -> None:
    assert [row.origin.rpartition(":")[2] for row in iter_rows(write_rows(tmp_path / "a.csv"))] == ["2", "4"]
    assert [row.origin.rpartition(":")[2] for row in iter_rows(write_rows(tmp_path / "a.jsonl"))] == ["1", "3"]
    assert [row.origin.rpartition(":")[2] for row in iter_rows(write_rows(tmp_path / "a.json"))] == ["2", "6"]


def test_iter_rows_reads_a_text_file_as_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.md"
    path.write_text("# One\n\ntwo\n", encoding="utf-8")
    assert [row.fields for row in iter_rows(path)] == [{"text": "# One\n\ntwo\n"}]


def test_iter_rows_recognises_a_semicolon_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question;"answer, in full"\nWhy?;"Because; so"\n', encoding="utf-8")
    assert next(iter_rows(path)).fields == {"question": "Why?", "answer, in full": "Because; so"}


@pytest.mark.parametrize(("name", "as_name"), [("a.jsonl", "a.json"), ("a.json", "b.jsonl")])
def test_iter_rows_takes_json_by_what_it_is(tmp_path: Path, name: str, as_name: str) -> None:
    path = write_rows(tmp_path / name).rename(tmp_path / as_name)
    assert [row.fields for row in iter_rows(path)] == ROWS


def test_iter_rows_takes_a_field_longer_than_csv_allows_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n", encoding="utf-8")
    before = csv.field_size_limit()
    assert len(next(iter_rows(path)).fields["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_iter_rows_streams_lines(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for number in range(20_000):
            stream.write(json.dumps({"text": f"{number} " + "x" * 200}) + "\n")
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_rows(path)) == 20_000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < path.stat().st_size / 8


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.csv", b"", "the file is empty"),
        ("a.json", b" \n", "only white space"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: broken JSON at column 6"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: holds a list"),
        ("a.jsonl", b"3\n", r"a\.jsonl:1: holds a int"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json:2: broken JSON at column 7"),
        ("a.csv", b'a,b\n1,2\n3,"4\n', r"a\.csv:3: broken quoting"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n", r"a\.csv:3: 3 fields where the first line names 2 columns"),
        ("a.csv", b"a,b\n1\n", r"a\.csv:2: 1 fields where"),
        ("a.csv", b"a,a\n1,2\n", "two columns have the name 'a'"),
        ("a.csv", b",\n1,2\n", "must name the columns"),
        (
            "a.csv",
            "a,b\nGr\u00fc\u00dfe,b\n".encode("cp1252"),
            r"a\.csv:2: byte 3 of the line \(0xfc\) is not UTF-8.*iconv",
        ),
        ("a.jsonl", '{"a": "\u00e9"}\n'.encode("latin-1"), r"a\.jsonl:1: byte 8 of the line \(0xe9\) is not UTF-8"),
        ("a.json", '[\n{"a": "\u00e9"}]'.encode("latin-1"), r"a\.json:2: byte 8 of the line"),
        ("a.txt", "one\ntw\u00f6".encode("latin-1"), r"a\.txt:2: byte 3 of the line"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "the file is UTF-16, not UTF-8.*iconv -f UTF-16"),
        ("a.jsonl.gz", b"no gzip", "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "damaged gzip file"),
        ("a.parquet", b"PAR1 is not enough", "not a readable Parquet file"),
        ("a.docx", b"x", r"do not know how to read.*\.jsonl"),
    ],
)
def test_iter_rows_explains_what_is_wrong(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"(?s){message}"):
        list(iter_rows(path))


def test_iter_rows_explains_a_missing_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'halfbyte\[parquet\]'"):
        list(iter_rows(path))
