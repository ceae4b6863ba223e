"""Which characters of a rendered conversation are learned, proved for any template or refused.

At inference the model is given `P = render(turns before, add_generation_prompt=True)` and has to go on. A mask is right
when the learned range of an answer starts exactly at the end of its P, ends with the end of its turn, and the text
before it is what the model will have read. Three ways, in this order:

1. **Markers.** The template says itself what is generated (`{% generation %}`); see `markers` for what is checked.
2. **Prefixes.** P must be a prefix of the whole conversation, and so must the conversation up to the answer's end
   (without what the template writes only at the very end). This is the definition of right above, checked by text.
3. **One answer at a time.** Some templates rewrite the past: Qwen3 removes the reasoning of earlier answers, Mistral's
   moves the system prompt to the last user turn. No single text is right for all answers then, so each answer becomes
   a training text of its own, ending with it, and again P must be its prefix. More tokens, still exact.

A template for which even that fails (it writes before an answer what a finished conversation does not have) would train
the model on text that never occurs at inference: an error that shows the two texts.

Answers before the first user turn (a greeting) are read and not learned: no prompt ever asks for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from halfbyte.data.chat import ChatTemplate
from halfbyte.data.examples import Message
from halfbyte.data.markers import find_marked_answers, visible_words
from halfbyte.errors import DataError

_SHOWN_CHARACTERS = 60


@dataclasses.dataclass(frozen=True)
class MaskedText:
    """A text and the character ranges of it that are learned.

    Args:
        text: What is tokenised.
        ranges: Learned ranges, in order and apart: (start, end).
        has_frame: Whether the tokenizer's own first token and the end token are added: yes for plain text, no for
            what a chat template wrote, which holds them.
        way: How the ranges were found: markers, unproved markers, prefixes, one by one, all, none.
    """

    text: str
    ranges: tuple[tuple[int, int], ...]
    has_frame: bool = False
    way: str = "all"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns to be rendered, and which of them are learned."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None
    learned: tuple[int, ...]


def learned_turns(messages: Sequence[Message], context_turns: frozenset[int]) -> tuple[int, ...]:
    """Return the indices of the answers that are learned: all but those marked as context and opening greetings."""
    first_user = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return tuple(
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i > first_user and i not in context_turns
    )


def mask_answers(template: ChatTemplate, conversation: Conversation) -> list[MaskedText]:
    """Render a conversation and find what is learned of it.

    Returns:
        One text, or one for each answer where the template rewrites the past.

    Raises:
        DataError: The template does not take the conversation, or no mask for it can be proved.
    """
    learned = conversation.learned
    if not learned:
        return [MaskedText(template.render(conversation.messages, tools=conversation.tools), (), way="none")]
    messages = conversation.messages[: learned[-1] + 1]
    whole = template.render(messages, tools=conversation.tools)
    marked = find_marked_answers(template, messages, learned=learned, tools=conversation.tools)
    if marked is not None and marked.text == whole:
        way = "markers" if marked.is_proved else "unproved markers"
        return [_finished(template, MaskedText(whole, marked.ranges, way=way))]
    found = [_answer_range(template, conversation, whole, turn) for turn in learned]
    ranges = tuple(found_range for found_range in found if found_range is not None)
    if len(ranges) == len(learned):
        for turn, (start, end) in zip(learned, ranges, strict=True):
            _check_words(template, messages[turn], number=turn + 1, text=whole[start:end])
        return [_finished(template, MaskedText(whole, ranges, way="prefixes"))]
    return [_mask_one_answer(template, conversation, turn) for turn in learned]


def mask_everything(template: ChatTemplate, conversation: Conversation) -> MaskedText:
    """Render a conversation of which every token is learned.

    Raises:
        DataError: The template does not take the conversation.
    """
    text = template.render(conversation.messages, tools=conversation.tools)
    return _finished(template, MaskedText(text, ((0, len(text)),), way="all"))


def _answer_range(template: ChatTemplate, conversation: Conversation, whole: str, turn: int) -> tuple[int, int] | None:
    """Return the range of one answer in a text, or None where the text does not hold what it must."""
    messages, tools = conversation.messages, conversation.tools
    prompt = template.render(messages[:turn], tools=tools, add_generation_prompt=True)
    if not whole.startswith(prompt):
        return None
    is_last = turn == conversation.learned[-1]
    finished = whole if is_last else template.render(messages[: turn + 1], tools=tools)
    end = _end_of_answer(template, finished)
    if end <= len(prompt) or not whole.startswith(finished[:end]):
        return None
    return len(prompt), end


def _mask_one_answer(template: ChatTemplate, conversation: Conversation, turn: int) -> MaskedText:
    alone = Conversation(conversation.messages[: turn + 1], conversation.tools, (turn,))
    whole = template.render(alone.messages, tools=alone.tools)
    found = _answer_range(template, alone, whole, turn)
    if found is None:
        raise DataError(_cannot_be_masked(template, alone, whole, turn))
    _check_words(template, alone.messages[turn], number=turn + 1, text=whole[slice(*found)])
    return _finished(template, MaskedText(whole, (found,), way="one by one"))


def _end_of_answer(template: ChatTemplate, finished: str) -> int:
    """Return where the last answer of a finished conversation ends, its end of turn included."""
    end_of_turn, closing = template.end_of_turn, template.closing
    if end_of_turn and finished.endswith(end_of_turn + closing):
        return len(finished) - len(closing)
    return len(finished.rstrip())


def _finished(template: ChatTemplate, masked: MaskedText) -> MaskedText:
    """Leave out what follows the last answer, which nothing is learned from; add an end where the template has none."""
    masked = dataclasses.replace(masked, text=masked.text[: masked.ranges[-1][1]])
    eos_token = template.tokenizer.eos_token
    if template.end_of_turn != "" or not eos_token or masked.text.endswith(eos_token):
        return masked
    start = masked.ranges[-1][0]
    text = masked.text + eos_token
    return dataclasses.replace(masked, text=text, ranges=(*masked.ranges[:-1], (start, len(text))))


def _check_words(template: ChatTemplate, message: Message, *, number: int, text: str) -> None:
    if visible_words(message) not in text:
        raise DataError(
            f"the chat template ({template.origin}) does not write the words of turn {number}; it has {text!r} there. "
            "It may be made for images, or for turns of another form. Give another one with --data.chat_template "
            "(chatml and headings are built in)."
        )


def _cannot_be_masked(template: ChatTemplate, conversation: Conversation, whole: str, turn: int) -> str:
    prompt = template.render(conversation.messages[:turn], tools=conversation.tools, add_generation_prompt=True)
    same = next((at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
    before, after = prompt[same : same + _SHOWN_CHARACTERS], whole[same : same + _SHOWN_CHARACTERS]
    return (
        f"the chat template ({template.origin}) cannot be masked: when turn {turn + 1} is asked for it writes "
        f"{before!r} where the finished conversation has {after!r}, so what is learned would never occur when the "
        "model is used. Give another template with --data.chat_template (chatml and headings are built in), or learn "
        "the whole text with --data.train_on=all."
    )
