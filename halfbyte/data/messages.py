"""Turns of a conversation, brought to the one form that chat templates take: role and content.

Roles go by many names; the table below is what is understood, everything else has to be mapped by the user
(`columns={"user": "customer|client"}`), because a guess would train the model on the wrong side of the conversation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from halfbyte.data.examples import Dropped, Example, Message
from halfbyte.data.json_document import UNREADABLE_JSON, why_unreadable
from halfbyte.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# What chat templates read beside role and content; annotations of other kinds (SGD's frames) are no part of the text.
_KEPT_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


@dataclasses.dataclass(frozen=True)
class TurnLayout:
    """How one turn is written: the keys of speaker and words, and what the speakers are called."""

    role_key: str = "role"
    content_key: str = "content"
    role_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: ROLE_NAMES)


def make_conversation(
    turns: Any, *, layout: TurnLayout, origin: str, system: str | None, tools: Any
) -> Example | Dropped:
    """Make an example of a list of turns.

    Args:
        turns: The list as the row holds it.
        layout: How a turn is written.
        origin: Where the row stands, for messages.
        system: A system prompt that the row gives beside its turns, or None.
        tools: Function schemas that the row gives, a list or its JSON text, or None.

    Raises:
        DataError: A turn that cannot be read: not a mapping, a role that is not known, words that are no text.
    """
    turns = parse_if_json(turns, origin)
    if not isinstance(turns, list | tuple):
        raise DataError(f"{origin}: the conversation is a {type(turns).__name__}, must be a list of turns.")
    if not turns:
        raise DataError(f"{origin}: the conversation has no turns. Remove the row or fill it.")
    messages = [
        _make_message(turn, layout=layout, where=f"{origin}, turn {i}") for i, turn in enumerate(turns, start=1)
    ]
    context = frozenset(i for i, turn in enumerate(turns) if _is_context(turn, where=f"{origin}, turn {i + 1}"))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        context = frozenset(i + 1 for i in context)
    for i, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            return Dropped(origin, f"turn {i}, the assistant's, is empty")
    parsed_tools = parse_if_json(tools, origin)
    if parsed_tools and not isinstance(parsed_tools, list | tuple):
        raise DataError(f"{origin}: tools is a {type(parsed_tools).__name__}, must be a list of function schemas.")
    return Example(
        origin=origin,
        messages=tuple(messages),
        tools=tuple(parsed_tools) if parsed_tools else None,
        context_turns=context,
    )


def as_text(value: Any, *, where: str) -> str:
    """Return a cell as text: numbers are written out, nothing is empty text.

    Raises:
        DataError: The cell holds something else, or half a character (a lone surrogate).
    """
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where} is a {type(value).__name__}, must be text.")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} holds half of a character ({value[error.start]!a}), as JSON escapes that were cut in "
                "two leave it. Remove it."
            ) from error
    return value


def parse_if_json(value: Any, origin: str) -> Any:
    """Return what a cell's JSON text stands for: tables have no lists, so they hold them as text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}: a cell starts like JSON and is broken at its character {error.pos + 1} ({error.msg})."
        ) from error
    except UNREADABLE_JSON as error:
        raise DataError(f"{origin}: a cell holds {why_unreadable(error)}") from error


def _make_message(turn: Any, *, layout: TurnLayout, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: is a {type(turn).__name__}, must be an object with a role and its words.")
    missing = [key for key in (layout.role_key,) if key not in turn]
    if layout.content_key not in turn and not turn.get("tool_calls"):
        missing.append(layout.content_key)
    if missing:
        raise DataError(
            f"{where}: has no {missing[0]!r}, only {', '.join(map(repr, turn)) or 'nothing'}. Every turn needs "
            f"{layout.role_key!r} and {layout.content_key!r}."
        )
    message: Message = {
        "role": _make_role(turn[layout.role_key], layout=layout, where=where),
        "content": _make_content(turn.get(layout.content_key), where=where),
    }
    message.update({key: turn[key] for key in _KEPT_KEYS if turn.get(key) is not None})
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list | tuple):
            raise DataError(f"{where}: tool_calls is a {type(message['tool_calls']).__name__}, must be a list.")
        message["tool_calls"] = [_decode_arguments(call) for call in message["tool_calls"]]
    return message


def _make_role(name: Any, *, layout: TurnLayout, where: str) -> str:
    role = layout.role_names.get(name.strip().lower()) if isinstance(name, str) else None
    if role is not None:
        return role
    close = get_close_matches(str(name).lower(), layout.role_names, n=1, cutoff=0.7)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise DataError(
        f"{where}: unknown role {name!r:.80}.{hint} Known: {', '.join(layout.role_names)}. For other names say who is "
        f"who, for example --data.columns=user={name!s:.80}"
    )


def _make_content(content: Any, *, where: str) -> str:
    if not isinstance(content, list | tuple):
        return as_text(content, where=f"{where}: the content")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise DataError(
                f"{where}: the content has a part of type {kind!r}. Only text can be learned here; leave out rows with "
                "images, sound or files."
            )
        texts.append(as_text(part.get("text"), where=f"{where}: the content"))
    return "".join(texts)


def _is_context(turn: Mapping[str, Any], *, where: str) -> bool:
    """Tell whether a turn is read and not learned: weight 0, as OpenAI's format has it."""
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise DataError(f"{where}: weight is {weight!r}, must be 0 (read only) or 1 (learned).")
    return weight == 0


def _decode_arguments(call: Any) -> Any:
    """Return a tool call with its arguments as an object: templates write them as JSON themselves."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (json.JSONDecodeError, *UNREADABLE_JSON):
        # Arguments that are no JSON are what the assistant really wrote: kept as the text they are.
        return call
    return {**call, "function": {**function, "arguments": arguments}}
