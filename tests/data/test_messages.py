"""Turns in every spelling, and turns that cannot be learned from."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.data.examples import Dropped, Example
from halfbyte.data.messages import TurnLayout, as_text, make_conversation
from halfbyte.errors import DataError

ASKED = {"role": "user", "content": "Where is it?"}
ANSWER = {"role": "assistant", "content": "On its way."}


def make(turns: Any, *, system: str | None = None, tools: Any = None, layout: TurnLayout | None = None) -> Example:
    """Make a conversation that is not left out."""
    made = make_conversation(turns, layout=layout or TurnLayout(), origin="a.jsonl:7", system=system, tools=tools)
    assert isinstance(made, Example)
    return made


def test_make_conversation_understands_role_names() -> None:
    layout = TurnLayout("from", "value")
    turns = [{"from": "Human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "observation", "value": "c"}]
    assert make(turns, layout=layout).messages == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "c"},
    )


def test_make_conversation_puts_a_system_prompt_first_unless_there_is_one() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert make([ASKED, ANSWER], system="Be kind.").messages == (system, ASKED, ANSWER)
    assert make([system, ASKED, ANSWER], system="Be rude.").messages == (system, ASKED, ANSWER)


def test_make_conversation_keeps_what_templates_read_and_nothing_else() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": '{"order": 7}'}}
    turns = [
        {**ASKED, "name": "Ann", "mood": "cross"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "look it up"},
        {"role": "tool", "content": "sent", "tool_call_id": "1"},
        ANSWER,
    ]
    messages = make(turns, tools='[{"type": "function"}]').messages
    assert messages is not None
    assert messages[0] == {**ASKED, "name": "Ann"}
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"order": 7}}}],
        "reasoning_content": "look it up",
    }
    assert messages[2] == {"role": "tool", "content": "sent", "tool_call_id": "1"}
    assert make(turns, tools='[{"type": "function"}]').tools == ({"type": "function"},)


def test_make_conversation_reads_turns_of_weight_zero_without_learning_them() -> None:
    turns = [ASKED, {**ANSWER, "weight": 0}, ASKED, {**ANSWER, "weight": 1}]
    assert make(turns).context_turns == {1}
    assert make(turns, system="Be kind.").context_turns == {2}


def test_make_conversation_joins_parts_of_text() -> None:
    parts = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
    assert make([{"role": "user", "content": parts}, ANSWER]).messages == (ASKED, ANSWER)


def test_make_conversation_reads_json_text_of_a_table_cell() -> None:
    assert make('[{"role": "user", "content": "Where is it?"}]').messages == (ASKED,)


def test_make_conversation_leaves_out_an_empty_answer() -> None:
    made = make_conversation(
        [ASKED, {**ANSWER, "content": " "}], layout=TurnLayout(), origin="a:1", system=None, tools=None
    )
    assert made == Dropped("a:1", "turn 2, the assistant's, is empty")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "the conversation has no turns"),
        ({"role": "user"}, "the conversation is a dict, must be a list"),
        (["hello"], "turn 1: is a str, must be an object"),
        ([ASKED, {"content": "x"}], "turn 2: has no 'role', only 'content'"),
        ([{"role": "user", "text": "x"}], "turn 1: has no 'content', only 'role', 'text'"),
        ([{"role": "asistant", "content": "x"}], "turn 1: unknown role 'asistant'. Did you mean 'assistant'"),
        (
            [{"role": "customer", "content": "x"}],
            "unknown role 'customer'. Known: system, .*--data.columns=user=customer",
        ),
        ([{"role": 3, "content": "x"}], "unknown role 3"),
        ([{"role": "user", "content": {"a": 1}}], "turn 1: the content is a dict, must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a part of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "a part of type 'str'"),
        ([{**ANSWER, "weight": 0.5}], "turn 1: weight is 0.5, must be 0"),
        ("[{", "a cell starts like JSON and is broken"),
        ([{"role": "user", "content": "half \ud83d"}], r"half of a character \('\\ud83d'\)"),
    ],
)
def test_make_conversation_explains_what_is_wrong(turns: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.jsonl:7.*{message}"):
        make(turns)


def test_as_text_writes_numbers_out() -> None:
    assert [as_text(value, where="x") for value in (4, 4.5, None, "\U0001f600")] == ["4", "4.5", "", "\U0001f600"]
    with pytest.raises(DataError, match="x is a bool, must be text"):
        as_text(True, where="x")
