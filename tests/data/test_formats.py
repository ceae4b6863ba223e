"""Each layout of rows, recognised and converted."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.data.examples import Example
from halfbyte.data.formats import FORMATS
from halfbyte.data.load import examples_from_rows
from halfbyte.errors import DataError

ASKED = {"role": "user", "content": "Where is it?"}
ANSWER = {"role": "assistant", "content": "On its way."}
EXCHANGE = (ASKED, ANSWER)
SYSTEM = {"role": "system", "content": "Be kind."}
Q, A = "Where is it?", "On its way."


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("messages", {"messages": [ASKED, ANSWER]}, EXCHANGE),
        ("messages", {"conversations": [ASKED, ANSWER], "system": "Be kind."}, (SYSTEM, *EXCHANGE)),
        ("sharegpt", {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, EXCHANGE),
        ("sgd", {"turns": [{"speaker": "USER", "utterance": Q}, {"speaker": "SYSTEM", "utterance": A}]}, EXCHANGE),
        ("self_instruct", {"instruction": Q, "instances": [{"input": "", "output": A}]}, EXCHANGE),
        ("alpaca", {"instruction": Q, "output": A}, EXCHANGE),
        ("alpaca", {"instruction": Q, "input": "", "output": A, "text": "both"}, EXCHANGE),
        ("alpaca", {"instruction": Q, "output": A, "system": "Be kind."}, (SYSTEM, *EXCHANGE)),
        ("prompt_completion", {"prompt": Q, "completion": A}, EXCHANGE),
        ("prompt_completion", {"Prompt": Q, " COMPLETION ": A, "text": "both"}, EXCHANGE),
        ("instruction_response", {"instruction": Q, "response": A, "context": "shop"}, EXCHANGE),
        ("question_answer", {"question": Q, "answer": A}, EXCHANGE),
        ("prompt_response", {"prompt": Q, "response": A}, EXCHANGE),
        ("question_response", {"system_prompt": "Be kind.", "question": Q, "response": A}, (SYSTEM, *EXCHANGE)),
        ("query_response", {"query": Q, "response": A}, EXCHANGE),
        ("input_output", {"input": Q, "output": A}, EXCHANGE),
    ],
)
def test_formats_are_recognised_and_converted(name: str, row: dict[str, Any], messages: tuple[Any, ...]) -> None:
    loaded = examples_from_rows([row], name="rows")
    assert loaded.format == name
    assert loaded.examples == [Example(origin="rows:1", messages=messages)]


def test_formats_join_instruction_and_input() -> None:
    row = {"instruction": "Translate.", "input": "Hallo", "output": "Hello"}
    example = examples_from_rows([row], name="rows").examples[0]
    assert example.messages is not None
    assert example.messages[0]["content"] == "Translate.\n\nHallo"


def test_formats_make_an_example_of_each_instance() -> None:
    row = {"instruction": "Double.", "instances": [{"input": "1", "output": "2"}, {"input": 2, "output": 4}]}
    examples = examples_from_rows([row], name="rows").examples
    assert [example.origin for example in examples] == ["rows:1, instance 1", "rows:1, instance 2"]
    assert [example.messages[1]["content"] for example in examples if example.messages] == ["2", "4"]


def test_formats_learn_only_the_completion_of_conversations() -> None:
    row = {"prompt": [ASKED, ANSWER, ASKED], "completion": [ANSWER]}
    example = examples_from_rows([row], name="rows").examples[0]
    assert example.messages == (*EXCHANGE, *EXCHANGE)
    assert example.context_turns == {0, 1, 2}


def test_formats_take_text_as_it_is() -> None:
    loaded = examples_from_rows([{"text": "all of it\n"}], name="rows")
    assert loaded.format == "text"
    assert loaded.examples == [Example(origin="rows:1", text="all of it\n")]


def test_formats_join_plain_pairs_only_when_asked() -> None:
    loaded = examples_from_rows([{"prompt": "2 + 2 =", "completion": " 4"}], name="rows", format="plain")
    assert loaded.examples == [Example(origin="rows:1", prompt="2 + 2 =", completion=" 4")]


def test_formats_leave_out_rows_without_an_answer() -> None:
    rows = [{"question": Q, "answer": A}, {"question": Q, "answer": None}, {"question": " ", "answer": A}]
    loaded = examples_from_rows(rows, name="rows")
    assert len(loaded) == 1
    assert [tuple(dropped) for dropped in loaded.report.dropped] == [
        ("rows:2", "answer is empty"),
        ("rows:3", "question is empty"),
    ]
    with pytest.raises(DataError, match=r"none of its 1 rows can be used\. The first: rows:1: text is empty"):
        examples_from_rows([{"text": ""}], name="rows")


def test_formats_have_a_summary_each() -> None:
    assert len({known.name for known in FORMATS}) == len(FORMATS)
    assert all(known.summary for known in FORMATS)


def test_formats_explain_a_cell_that_is_no_text() -> None:
    with pytest.raises(DataError, match="rows:1: answer is a dict, must be text"):
        examples_from_rows([{"question": Q, "answer": {"text": A}}], name="rows")
    with pytest.raises(DataError, match="every instance must be an object"):
        examples_from_rows([{"instruction": Q, "instances": ["x"]}], name="rows")
