"""How rows become examples: the layouts of training data that people really have.

| format               | columns, and what is read and learned                                                     |
|----------------------|-------------------------------------------------------------------------------------------|
| messages             | messages: a list of {role, content}, as OpenAI writes it; tools and weight are understood |
| sharegpt             | conversations: a list of {from, value}                                                    |
| sgd                  | turns: a list of {speaker, utterance}; SYSTEM speaks for the assistant                    |
| self_instruct        | instruction, instances: a list of {input, output}; one example each                       |
| alpaca               | instruction, output, and input where there is one                                         |
| prompt_completion    | prompt, completion: a user's turn and the answer to it (or two lists of messages)         |
| instruction_response | instruction, response                                                                     |
| question_answer      | question, answer                                                                          |
| prompt_response, question_response, query_response, input_output | the same, by other names                      |
| text                 | text: every token is learned                                                              |
| plain                | prompt, completion, joined as they are without a chat template; only when asked for       |

The first row decides, in this order, and all rows must fit. Names of columns are compared without regard to case. Where
several layouts fit, the more specific one stands first: a row with instruction, output and text (as Alpaca's own file
has it) is alpaca. Anything else is reached by naming the columns, `columns={"prompt": "customer_query", "completion":
"reply"}`, the turns' keys, `columns={"messages": "log", "role": "who", "content": "said"}`, or the speakers,
`columns={"user": "customer|client", "assistant": "agent"}`. A column "system" (or "system_prompt") is the
system prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from halfbyte.data.examples import Dropped, Example
from halfbyte.data.messages import TurnLayout, as_text, make_conversation, parse_if_json
from halfbyte.errors import DataError

Fields = Mapping[str, Any]
_LIST_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_SYSTEM_COLUMNS = ("system", "system_prompt")


class Format(Protocol):
    """A layout of rows."""

    @property
    def name(self) -> str:
        """What the layout is called."""

    @property
    def summary(self) -> str:
        """Its columns, for people."""

    def matches(self, fields: Fields) -> bool:
        """Tell whether a row has this layout."""

    def used_columns(self, fields: Fields) -> set[str]:
        """Return the columns of a row that become part of the example."""

    def convert(self, fields: Fields, *, origin: str) -> Iterator[Example | Dropped]:
        """Yield the examples of one row."""


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """A list of turns in one column."""

    name: str
    layout: TurnLayout
    list_columns: tuple[str, ...] = _LIST_COLUMNS

    @property
    def summary(self) -> str:
        return f"{self.list_columns[0]}: a list of {{{self.layout.role_key}, {self.layout.content_key}}}"

    def matches(self, fields: Fields) -> bool:
        return self._column(fields) is not None

    def used_columns(self, fields: Fields) -> set[str]:
        return {str(self._column(fields)), "tools"} | _system_columns(fields)

    def convert(self, fields: Fields, *, origin: str) -> Iterator[Example | Dropped]:
        system = _system_text(fields, origin)
        turns = fields[str(self._column(fields))]
        yield make_conversation(turns, layout=self.layout, origin=origin, system=system, tools=fields.get("tools"))

    def _column(self, fields: Fields) -> str | None:
        return next((name for name in self.list_columns if name in fields and self._fits(fields[name])), None)

    def _fits(self, turns: Any) -> bool:
        """Look at the first turn; an empty list fits too, so that it is found and named when it is read."""
        turns = parse_if_json(turns, "a list of turns") if isinstance(turns, str) else turns
        if not isinstance(turns, list | tuple):
            return False
        return not turns or (isinstance(turns[0], Mapping) and self.layout.role_key in turns[0])


@dataclasses.dataclass(frozen=True)
class PairFormat:
    """What is asked in one column (or two) and the answer in another."""

    name: str
    prompt_column: str
    completion_column: str
    input_column: str | None = None
    is_plain: bool = False

    @property
    def summary(self) -> str:
        return f"{self.prompt_column}, {self.completion_column}" + (
            f", and {self.input_column} where there is one" if self.input_column else ""
        )

    def matches(self, fields: Fields) -> bool:
        return self.prompt_column in fields and self.completion_column in fields

    def used_columns(self, fields: Fields) -> set[str]:
        columns = {self.prompt_column, self.completion_column}
        if self.input_column in fields:
            columns.add(str(self.input_column))
        return columns if self.is_plain else columns | _system_columns(fields)

    def convert(self, fields: Fields, *, origin: str) -> Iterator[Example | Dropped]:
        prompt, completion = fields[self.prompt_column], fields[self.completion_column]
        if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
            yield _join_conversations(prompt, completion, fields=fields, origin=origin)
            return
        asked = as_text(prompt, where=f"{origin}: {self.prompt_column}")
        answer = as_text(completion, where=f"{origin}: {self.completion_column}")
        if self.input_column is not None and fields.get(self.input_column):
            asked += "\n\n" + as_text(fields[self.input_column], where=f"{origin}: {self.input_column}")
        empty = [
            name for name, text in ((self.prompt_column, asked), (self.completion_column, answer)) if not text.strip()
        ]
        if empty:
            yield Dropped(origin, f"{empty[0]} is empty")
        elif self.is_plain:
            yield Example(origin=origin, prompt=asked, completion=answer)
        else:
            yield _exchange(asked, answer, system=_system_text(fields, origin), origin=origin)


@dataclasses.dataclass(frozen=True)
class SelfInstructFormat:
    """An instruction with several inputs and outputs."""

    name: str = "self_instruct"
    summary: str = "instruction, instances: a list of {input, output}"

    def matches(self, fields: Fields) -> bool:
        return "instruction" in fields and isinstance(fields.get("instances"), list | tuple)

    def used_columns(self, fields: Fields) -> set[str]:
        return {"instruction", "instances"}

    def convert(self, fields: Fields, *, origin: str) -> Iterator[Example | Dropped]:
        pair = PairFormat(self.name, "instruction", "output", "input")
        for number, instance in enumerate(fields["instances"], start=1):
            where = f"{origin}, instance {number}" if len(fields["instances"]) > 1 else origin
            if not isinstance(instance, Mapping) or "output" not in instance:
                raise DataError(f"{where}: every instance must be an object with input and output.")
            yield from pair.convert({**instance, "instruction": fields["instruction"]}, origin=where)


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """Plain text, all of it learned."""

    name: str = "text"
    summary: str = "text: every token is learned"

    def matches(self, fields: Fields) -> bool:
        return "text" in fields

    def used_columns(self, fields: Fields) -> set[str]:
        return {"text"}

    def convert(self, fields: Fields, *, origin: str) -> Iterator[Example | Dropped]:
        text = as_text(fields["text"], where=f"{origin}: text")
        yield Example(origin=origin, text=text) if text.strip() else Dropped(origin, "text is empty")


_SGD_ROLES = {"user": "user", "system": "assistant"}
# In the order in which they are tried.
FORMATS: tuple[Format, ...] = (
    ChatFormat("messages", TurnLayout()),
    ChatFormat("sharegpt", TurnLayout("from", "value"), ("conversations", *_LIST_COLUMNS)),
    ChatFormat("sgd", TurnLayout("speaker", "utterance", _SGD_ROLES), ("turns",)),
    SelfInstructFormat(),
    PairFormat("alpaca", "instruction", "output", "input"),
    PairFormat("prompt_completion", "prompt", "completion", "input"),
    PairFormat("instruction_response", "instruction", "response", "input"),
    PairFormat("question_answer", "question", "answer", "input"),
    PairFormat("prompt_response", "prompt", "response", "input"),
    PairFormat("question_response", "question", "response", "input"),
    PairFormat("query_response", "query", "response", "input"),
    PairFormat("input_output", "input", "output"),
    TextFormat(),
    PairFormat("plain", "prompt", "completion", is_plain=True),
)


def _exchange(asked: str, answer: str, *, system: str | None, origin: str) -> Example:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Example(origin=origin, messages=tuple(messages))


def _join_conversations(prompt: Any, completion: Any, *, fields: Fields, origin: str) -> Example | Dropped:
    """Make one conversation of a prompt and a completion that are lists of messages; only the completion is learned."""
    turns = [{**turn, "weight": 0} if isinstance(turn, Mapping) else turn for turn in prompt]
    return make_conversation(
        [*turns, *completion],
        layout=TurnLayout(),
        origin=origin,
        system=_system_text(fields, origin),
        tools=fields.get("tools"),
    )


def _system_columns(fields: Fields) -> set[str]:
    return {name for name in _SYSTEM_COLUMNS if name in fields}


def _system_text(fields: Fields, origin: str) -> str | None:
    for name in _SYSTEM_COLUMNS:
        if fields.get(name):
            return as_text(fields[name], where=f"{origin}: {name}")
    return None
