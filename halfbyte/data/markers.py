"""Answers as a template marks them itself, between `{% generation %}` and `{% endgeneration %}`.

The author's word is taken, after these checks and corrections:

* every answer's words stand in a range, or the markers are not used;
* the end of the turn belongs to the answer, where the author left it outside; line breaks after it do not;
* what the template writes when an answer is asked for (the header of the turn) is not learned, where some authors put
  it inside: the model never has to write it. Where the template writes something else when asked than in a finished
  conversation (DeepSeek's opens a thought), the range stays as the author has it, and is counted as not proved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from halfbyte.data.chat import ChatTemplate, MarkedText
from halfbyte.data.examples import Message

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class MarkedAnswers:
    """The ranges of a text that are learned.

    Args:
        text: The rendered conversation.
        ranges: Learned ranges, in order and apart.
        is_proved: Whether each answer starts exactly where the prompt for it ends.
    """

    text: str
    ranges: tuple[Range, ...]
    is_proved: bool


def find_marked_answers(
    template: ChatTemplate, messages: Sequence[Message], *, learned: tuple[int, ...], tools: Sequence[Any] | None
) -> MarkedAnswers | None:
    """Return the learned ranges that the template marks, or None where it has no markers that hold the answers.

    Args:
        template: The template.
        messages: The turns, up to the last learned one.
        learned: Which of them are learned.
        tools: Function schemas.
    """
    if not template.has_markers:
        return None
    marked = template.render_marked(messages, tools=tools)
    by_turn = _ranges_by_turn(marked, messages)
    num_answers = sum(message["role"] == "assistant" for message in messages)
    if by_turn is None or (num_answers > len(learned) and len(marked.ranges) != num_answers):
        # With several ranges a turn and turns that are not learned, it cannot be told safely which range is whose.
        return None
    ranges: list[Range] = []
    is_proved = True
    for turn in learned:
        prompt = template.render(messages[:turn], tools=tools, add_generation_prompt=True)
        starts_with_prompt = marked.text.startswith(prompt)
        is_proved = is_proved and starts_with_prompt
        earliest = len(prompt) if starts_with_prompt else 0
        corrected = [_with_end_of_turn(template, marked.text, given) for given in by_turn[turn]]
        kept = [(max(start, earliest), end) for start, end in corrected if end > max(start, earliest)]
        if not kept:
            return None
        ranges += kept
    return MarkedAnswers(marked.text, tuple(ranges), is_proved)


def visible_words(message: Message) -> str:
    """Return what must stand in the text of an answer: its words without the reasoning, which templates may drop."""
    return message["content"].rpartition("</think>")[2].strip()


def _ranges_by_turn(marked: MarkedText, messages: Sequence[Message]) -> dict[int, list[Range]] | None:
    """Return the ranges of each answer; a turn's last range is the one that holds its words."""
    by_turn: dict[int, list[Range]] = {}
    cursor, last_answer = 0, None
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        words = visible_words(message)
        held = [n for n in range(cursor, len(marked.ranges)) if words in marked.text[slice(*marked.ranges[n])]]
        if not held:
            return None
        by_turn[turn] = list(marked.ranges[cursor : held[0] + 1])
        cursor, last_answer = held[0] + 1, turn
    if last_answer is not None:
        by_turn[last_answer] += marked.ranges[cursor:]
    return by_turn


def _with_end_of_turn(template: ChatTemplate, text: str, given: Range) -> Range:
    start, end = given
    end_of_turn = template.end_of_turn
    if not end_of_turn:
        return given
    if text.startswith(end_of_turn, end):
        return start, end + len(end_of_turn)
    shorter = text[start:end].rstrip()
    return (start, start + len(shorter)) if shorter.endswith(end_of_turn) else given
