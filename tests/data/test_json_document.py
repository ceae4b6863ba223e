"""Lists of rows, wherever a JSON document keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.json_document import read_json_document
from halfbyte.errors import DataError

PATH = Path("a.json")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
json_rows = st.lists(st.dictionaries(st.text(max_size=4), json_values, min_size=1, max_size=3), min_size=1, max_size=5)


def read(document: Any, *, split: str = "train", indent: int | None = None) -> list[dict[str, Any]]:
    """Write a document as text and read its rows."""
    text = document if isinstance(document, str) else json.dumps(document, indent=indent)
    return [row.fields for row in read_json_document(text, path=PATH, split=split)]


@given(rows=json_rows, indent=st.sampled_from([None, 1]))
def test_read_json_document_gives_the_rows_of_a_list(rows: list[dict[str, Any]], indent: int | None) -> None:
    assert read(rows, indent=indent) == rows


@given(rows=json_rows, indent=st.sampled_from([None, 1]), other=json_values.filter(lambda v: not isinstance(v, list)))
def test_read_json_document_finds_the_list_in_an_object(
    rows: list[dict[str, Any]], indent: int | None, other: Any
) -> None:
    assert read({"version": other, "data": rows, "about": other}, indent=indent) == rows


def test_read_json_document_takes_the_split() -> None:
    document = {"train": [{"a": 1}], "test": [{"a": 2}]}
    assert read(document) == [{"a": 1}]
    assert read(document, split="test") == [{"a": 2}]
    with pytest.raises(DataError, match=r"several lists of rows \(train, test\).*--data.split"):
        read(document, split="dev")


def test_read_json_document_takes_an_object_that_is_a_row() -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert read(row) == [row]
    assert read({"prompt": "a", "completion": "b"}) == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "only white space"),
        ("7", "must hold a list of rows"),
        ("[1]", "the list holds a int"),
        ('[{"a": 1}\n{"a": 2}]', r"a\.json:2: broken JSON at column 1 \(Expecting ','"),
        ('[{"a": 1}', "broken JSON"),
        ('[{"a": 1}] x', r"broken JSON at column 12 \(Extra data\)"),
        ('{"data": [{"a": 1}]} x', "Extra data"),
        ('{"data": [{"a": 1}}', "broken JSON"),
        ('{"data" [{"a": 1}]}', "Expecting ':'"),
        ('{1: [{"a": 1}]}', "Expecting property name"),
        ('{"data": [{"a": 1}] "b": 1}', "Expecting ','"),
    ],
)
def test_read_json_document_explains_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(text)


def test_names_of_lists_are_shown_in_part() -> None:
    document = {f"{number}" * 5000: [{"a": 1}] for number in range(20)}
    with pytest.raises(DataError, match="several lists of rows") as caught:
        read(document)
    assert len(str(caught.value)) < 1500
