"""Files, folders and names, and which of a folder's files are read."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pytest

from halfbyte.data.sources import find_source
from halfbyte.errors import DataError

ROW = '{"text": "hello there"}\n'


def make_folder(folder: Path, names: list[str]) -> Path:
    """Make files that each hold one row."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text\nhello there\n" if path.suffix == ".csv" else ROW, encoding="utf-8")
    return folder


def read_names(folder: Path, split: str = "train") -> list[str]:
    """Return the names of the files that are read."""
    return [str(path.relative_to(folder)) for path in find_source(folder, split=split).files]


def test_find_source_takes_all_files_of_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["b.jsonl", "a.csv", "more/c.jsonl", ".hidden/d.jsonl", "LICENSE.txt", "README.md"])
    assert read_names(folder) == ["a.csv", "b.jsonl", "more/c.jsonl"]


def test_find_source_does_not_train_on_other_splits(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["train_1.jsonl", "train_2.jsonl", "dev.jsonl", "test.jsonl", "more.jsonl"])
    assert read_names(folder) == ["more.jsonl", "train_1.jsonl", "train_2.jsonl"]
    assert read_names(folder, "test") == ["test.jsonl"]
    assert read_names(folder, "validation") == ["dev.jsonl"]
    assert find_source(folder).left_out == (
        f"{folder / 'dev.jsonl'} (split validation)",
        f"{folder / 'test.jsonl'} (split test)",
    )


def test_find_source_reads_texts_where_there_is_nothing_else(tmp_path: Path) -> None:
    assert read_names(make_folder(tmp_path / "books", ["a.txt", "b.md", "notes.png"])) == ["a.txt", "b.md"]
    assert find_source(tmp_path / "books").is_text
    assert read_names(make_folder(tmp_path / "both", ["a.txt", "b.jsonl"])) == ["b.jsonl"]


def test_find_source_explains_a_folder_without_the_split(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["test.jsonl", "dev.jsonl"])
    with pytest.raises(DataError, match=r"no file of the split 'train'.*test, validation"):
        find_source(folder)


def test_find_source_explains_a_folder_without_data(tmp_path: Path) -> None:
    make_folder(tmp_path, ["README.md", "picture.png"])
    with pytest.raises(DataError, match="no file of examples"):
        find_source(tmp_path)


def test_find_source_explains_a_missing_file(tmp_path: Path) -> None:
    make_folder(tmp_path, ["tickets.jsonl"])
    with pytest.raises(DataError, match=r"no such file or folder. Did you mean .*tickets\.jsonl\?"):
        find_source(tmp_path / "tikcets.jsonl")
    with pytest.raises(DataError, match="does not exist either"):
        find_source(tmp_path / "nowhere" / "tickets.jsonl")


def test_iter_rows_explains_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: the file holds no rows"):
        list(find_source(path).iter_rows())


def test_iter_rows_explains_a_name_that_the_hub_does_not_give() -> None:
    with pytest.raises(DataError, match="no-one/no-such-set: no such file or folder, and the hub gave no data set"):
        list(find_source("no-one/no-such-set").iter_rows())


def test_iter_rows_explains_a_missing_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets package: pip install 'halfbyte\[hub\]'"):
        list(find_source("no-one/no-such-set").iter_rows())


def test_iter_rows_reads_a_saved_data_set(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "both")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    for folder in ("both", "one"):
        assert [row.fields for row in find_source(tmp_path / folder).iter_rows()] == rows
    with pytest.raises(DataError, match="has no split 'test', only: train"):
        list(find_source(tmp_path / "both", split="test").iter_rows())
