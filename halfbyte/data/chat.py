"""The chat template: how a conversation becomes text, and what can be known about any template by trying it.

A template is a Jinja program that comes with the tokenizer. Nothing is known about it in advance, so three facts are
found by rendering a small conversation whose words cannot occur in the template itself:

* **the end of a turn**: what follows the assistant's words, up to and including the first token that the tokenizer
  keeps whole (`<|im_end|>`, `</s>`, `<|eot_id|>`); without such a token, all of it that is not white space. This is
  what the model must learn to write, or it never stops.
* **the closing**: what the template writes after that, at the end of a finished conversation (a line break, or as Phi-3
  does `<|endoftext|>`). No model is asked to write it, and it is missing where the conversation goes on.
* **whether system turns are taken**: some templates raise an error, some leave the words out without one. For both,
  the system prompt goes in front of the first user turn, as those models' makers do it themselves.

Base models have no template. Theirs is built in: ChatML where the tokenizer has its two tokens, else headings in plain
text with the end token after each answer, because tokens that were never trained teach nothing to a frozen embedding.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from halfbyte.data.examples import Message
from halfbyte.errors import DataError
from halfbyte.memory.bounded import bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADINGS_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
    "{% else %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
BUILT_IN_TEMPLATES = {"chatml": CHATML_TEMPLATE, "headings": HEADINGS_TEMPLATE}
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SYSTEM, _USER, _ASSISTANT = "qzsystemzq", "qzuserzq", "qzassistantzq"
_EXCHANGE = ({"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT})


# What a template raises on purpose, and what its expressions do with values that it did not think of.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


class TemplateRefusalError(DataError):
    """The template raised an error for a conversation."""


@dataclasses.dataclass(frozen=True)
class MarkedText:
    """A rendered conversation with the character ranges that the template itself marks as the assistant's."""

    text: str
    ranges: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A chat template with the facts found about it.

    Args:
        tokenizer: The tokenizer whose tokens and special names the template uses.
        text: The Jinja program; None for the tokenizer's own, which may be several by name.
        origin: Whose template it is, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, text: str | None, origin: str) -> None:
        self.tokenizer = tokenizer
        self.origin = origin
        self._given = text

    @property
    def text(self) -> str:
        """The Jinja program that plain conversations are rendered with."""
        return self.tokenizer.get_chat_template(self._given)

    @functools.cached_property
    def has_markers(self) -> bool:
        """Whether the template marks what the assistant generates, and not what the user says."""
        if _GENERATION_MARKER.search(self.text) is None:
            return False
        marked = self.render_marked(_EXCHANGE)
        held = "".join(marked.text[start:end] for start, end in marked.ranges)
        return _ASSISTANT in held and _USER not in held

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return the conversation as the model reads it.

        Args:
            messages: The turns, at least one.
            tools: Function schemas.
            add_generation_prompt: Whether to end with what comes before an answer.

        Raises:
            TemplateRefusalError: The template does not take this conversation.
        """
        try:
            with bounded(f"the chat template ({self.origin})"):
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    chat_template=self._given,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
        except _REFUSALS as error:
            raise TemplateRefusalError(f"the chat template does not take this conversation: {error}") from error
        assert isinstance(text, str), "one conversation, not tokenised"
        return text

    def render_marked(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> MarkedText:
        """Return the conversation with the ranges between the template's generation markers.

        Raises:
            TemplateRefusalError: The template does not take this conversation.
        """
        names: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        try:
            with bounded(f"the chat template ({self.origin})"):
                rendered: Any = render_jinja_template(
                    conversations=[list(messages)],
                    tools=list(tools) if tools else None,
                    chat_template=self.tokenizer.get_chat_template(self._given, list(tools) if tools else None),
                    return_assistant_tokens_mask=True,
                    **names,
                )
        except _REFUSALS as error:
            raise TemplateRefusalError(f"the chat template does not take this conversation: {error}") from error
        texts, ranges = rendered
        return MarkedText(texts[0], tuple(ranges[0]))

    @functools.cached_property
    def _probe_tail(self) -> str | None:
        """What follows the assistant's words at the end of a conversation; None where they come out changed."""
        text = self.render(_EXCHANGE)
        _, found, tail = text.rpartition(_ASSISTANT)
        return tail if found else None

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """What ends an answer; empty where the template writes nothing, None where it cannot be told."""
        if self._probe_tail is None:
            return None
        ends = []
        for token in self.tokenizer.get_added_vocab():
            position = self._probe_tail.find(token)
            if position >= 0 and token.strip():
                # The longest of those that start first, as the tokenizer would take it.
                ends.append((position, -len(token)))
        if not ends:
            return self._probe_tail.rstrip()
        position, negative_length = min(ends)
        return self._probe_tail[: position - negative_length]

    @functools.cached_property
    def closing(self) -> str:
        """What a finished conversation ends with after the end of the last turn."""
        return (self._probe_tail or "")[len(self.end_of_turn or "") :]

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether a system turn is rendered; some templates raise, some leave it out."""
        system = [{"role": "system", "content": _SYSTEM}]
        try:
            return _SYSTEM in self.render([*system, *_EXCHANGE])
        except TemplateRefusalError:
            return False


def find_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> ChatTemplate:
    """Return the template to use: the one given, the tokenizer's, or a built-in one.

    Args:
        tokenizer: The model's tokenizer.
        chat_template: A Jinja program, the path of one, the name of one of the tokenizer's or of a built-in one
            ("chatml", "headings"); None for the tokenizer's own or the built-in one that suits it.

    Raises:
        DataError: The given one is none of these, or there is nothing that suits.
    """
    if chat_template is not None:
        return _given_template(tokenizer, chat_template)
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(f"the tokenizer has several chat templates: {names}. Choose one with --data.chat_template.")
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer, text=None, origin="the tokenizer's own")
    vocabulary = tokenizer.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return _built_in_template(tokenizer, "chatml", "the tokenizer has none")
    return _built_in_template(tokenizer, "headings", "the tokenizer has none")


def _given_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ChatTemplate:
    if chat_template in BUILT_IN_TEMPLATES:
        return _built_in_template(tokenizer, chat_template, "as asked for")
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chat_template in named:
        return ChatTemplate(tokenizer, text=named[chat_template], origin=f"the tokenizer's {chat_template!r}")
    if "{{" in chat_template or "{%" in chat_template:
        return ChatTemplate(tokenizer, text=chat_template, origin="the one given")
    try:
        text = Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"chat_template: {chat_template!r} is no Jinja template (no '{{{{' in it), no file that can be read "
            f"({error}) and none of: {', '.join([*BUILT_IN_TEMPLATES, *named])}"
        ) from error
    return ChatTemplate(tokenizer, text=text, origin=f"the one in {chat_template}")


def _built_in_template(tokenizer: PreTrainedTokenizerBase, name: str, why: str) -> ChatTemplate:
    text = BUILT_IN_TEMPLATES[name]
    if name == "headings" and not tokenizer.eos_token:
        raise DataError(
            "the tokenizer has neither a chat template nor an end token, so the model could never learn to stop. Set "
            "its eos_token, or give --data.chat_template."
        )
    if _adds_bos(tokenizer):
        text = "{{ bos_token }}" + text
    return ChatTemplate(tokenizer, text=text, origin=f"the built-in {name!r} ({why})")


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
