"""Columns that the user names, and the way shown to those who have not."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.data.load import examples_from_rows
from halfbyte.errors import DataError

EXCHANGE = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


@pytest.mark.parametrize(
    ("row", "columns", "format_name"),
    [
        (
            {"customer_query": "q", "reply": "a"},
            {"prompt": "customer_query", "completion": "reply"},
            "prompt_completion",
        ),
        ({"text": "q", "category": "a"}, {"prompt": "text", "completion": "category"}, "prompt_completion"),
        ({"Prompt": "q", "Reply": "a"}, {"completion": "reply"}, "prompt_completion"),
        (
            {"log": [{"who": "customer", "said": "q"}, {"who": "Agent", "said": "a"}]},
            {"messages": "log", "role": "who", "content": "said", "user": "customer", "assistant": "agent|bot"},
            "messages",
        ),
        (
            {"conversations": [{"from": "client", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"user": "client"},
            "sharegpt",
        ),
    ],
)
def test_recognise_follows_the_named_columns(row: dict[str, Any], columns: dict[str, str], format_name: str) -> None:
    loaded = examples_from_rows([row], name="rows", columns=columns)
    assert loaded.format == format_name
    assert loaded.examples[0].messages == EXCHANGE
    assert loaded.report.unused_columns == ()


def test_recognise_prefers_the_format_of_the_named_columns() -> None:
    loaded = examples_from_rows([{"question": "q", "answer": "a", "body": "t"}], name="rows", columns={"text": "body"})
    assert loaded.format == "text"
    assert loaded.report.unused_columns == ("question", "answer")


def test_recognise_takes_a_system_column() -> None:
    row = {"q": "q", "a": "a", "s": "Be kind."}
    loaded = examples_from_rows([row], name="rows", columns={"prompt": "q", "completion": "a", "system": "s"})
    assert loaded.examples[0].messages == ({"role": "system", "content": "Be kind."}, *EXCHANGE)


@pytest.mark.parametrize("name", ["question_answer", "Question/Answer", "question-answer"])
def test_recognise_takes_a_format_by_name(name: str) -> None:
    assert examples_from_rows([{"question": "q", "answer": "a"}], name="rows", format=name).format == "question_answer"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"a": 1}, {"format": "alpacca"}, "format 'alpacca' is not known. Did you mean 'alpaca'"),
        ({"a": 1}, {"columns": {"promt": "a"}}, "'promt' is no part of a format. Did you mean 'prompt'"),
        (
            {"question": "q", "answer": "a"},
            {"columns": {"prompt": "questoin"}},
            "no column 'questoin' .named for prompt.. Did you mean 'question'. The columns are: question, answer",
        ),
        (
            {"question": "q", "answer": "a"},
            {"format": "alpaca"},
            "the format alpaca needs the columns instruction, output.*the columns are: question, answer.*"
            "--data.columns=prompt=question,completion=answer",
        ),
        (
            {"id": 1, "customer_query": "q", "agent_reply": "a"},
            {},
            "rows:1: the columns fit no known format: id, customer_query, agent_reply. Say which column is what: "
            "--data.columns=prompt=customer_query,completion=agent_reply.*Known formats:.*sharegpt",
        ),
        ({"x": "q", "y": "a"}, {}, "--data.columns=prompt=COLUMN,completion=COLUMN"),
        (
            {"log": [{"who": "a", "said": "b"}]},
            {},
            "If log holds the turns of a conversation: --data.columns=messages=log,role=who,content=said",
        ),
        ({"messages": []}, {}, "rows:1: the conversation has no turns"),
        ({}, {}, "the columns fit no known format: none"),
    ],
)
def test_recognise_explains_what_is_wrong(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        examples_from_rows([row], name="rows", **options)


def test_check_names_the_row_that_does_not_fit() -> None:
    rows = [{"question": "q", "answer": "a"}, {"text": "t"}]
    with pytest.raises(
        DataError, match=r"rows:2: does not fit the format of the first row, question_answer .*It looks like text"
    ):
        examples_from_rows(rows, name="rows")
