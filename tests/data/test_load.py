"""From a name to examples, with a report of how."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import datasets
import pytest

import halfbyte.data.load as load
from halfbyte.data.load import examples_from_rows, load_examples
from halfbyte.errors import DataError


def test_load_examples_names_the_format_and_what_is_left_out(tmp_path: Path) -> None:
    rows = [{"id": n, "question": "q", "answer": "a" if n else ""} for n in range(2)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[1]), encoding="utf-8")
    loaded = load_examples(tmp_path)
    assert loaded.format == "question_answer"
    assert [example.origin for example in loaded.examples] == [f"{tmp_path / 'train.jsonl'}:2"]
    assert str(loaded.report).splitlines() == [
        f"{tmp_path}: 2 rows, read as question_answer",
        f"files left out: {tmp_path / 'test.jsonl'} (split test)",
        "columns not used: id",
        "rows left out: 1",
        f"  {tmp_path / 'train.jsonl'}:1: answer is empty",
    ]


def test_load_examples_makes_documents_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    assert [(example.text, example.is_document) for example in load_examples(tmp_path).examples] == [
        ("one", True),
        ("two", True),
    ]


def test_load_examples_keeps_texts_of_a_table_to_be_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}', encoding="utf-8")
    assert not load_examples(tmp_path / "a.jsonl").examples[0].is_document


def test_load_examples_explains_files_of_different_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl:1: does not fit the format of the first row"):
        load_examples(tmp_path)


def test_examples_from_rows_takes_a_data_set() -> None:
    data_set = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    assert [example.text for example in examples_from_rows(data_set, name="rows").examples] == ["one", "two"]


def test_examples_from_rows_explains_that_there_are_none() -> None:
    with pytest.raises(DataError, match="rows: holds no rows"):
        examples_from_rows([], name="rows")


def test_load_examples_docstring_is_true() -> None:
    assert doctest.testmod(load).failed == 0
    assert doctest.testmod(load).attempted > 0


def test_load_report_names_few_of_many_files(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number:04}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    report = load_examples(tmp_path).report
    assert len(report.files) == report.num_rows == 1000
    assert "0004.jsonl and 995 more" in str(report)


def test_load_examples_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_ROWS_BETWEEN_PROGRESS", 2)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    told: list[int] = []
    load_examples(tmp_path / "x.jsonl", on_progress=told.append)
    assert told == [2, 4]
