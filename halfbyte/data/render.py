"""From examples to tokens and masks, as the model will see them when it is used."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.data.chat import ChatTemplate, find_chat_template
from halfbyte.data.encode import EncodedText, Encoder
from halfbyte.data.examples import Example, Message, TokenizedExample
from halfbyte.data.masks import Conversation, MaskedText, learned_turns, mask_answers, mask_everything
from halfbyte.errors import DataError
from halfbyte.memory.bounded import bounds_kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "all"]
_NOTES = {
    "markers": "{} conversations masked by the template's own generation markers",
    "unproved markers": "{} conversations masked by the template's own generation markers, although the template "
    "writes something else when an answer is asked for: what is learned differs from what is used later",
    "prefixes": "{} conversations masked by rendering their prefixes",
    "one by one": "the template rewrites earlier answers: {} training texts made, one for each answer",
    "pieces": "{} examples tokenised in pieces, because prompt and answer share a token otherwise",
    "folded": "the template takes no system turn: {} system prompts put in front of the first user turn",
    "system": "{} examples without a system prompt were given data.system",
    "greeting": "{} answers before the first user turn are read and not learned",
    "unanswered": "{} conversations end with turns that nobody answers; those turns are left out",
    "left out": "{} turns are left out or changed by the chat template",
    "control": "{} examples hold a control token of the model in their own words; it is read as that token",
}


class Renderer:
    """Turns examples into tokens and masks.

    Args:
        tokenizer: The model's tokenizer; not changed.
        chat_template: As in `find_chat_template`.
        system: System prompt for conversations that have none.
        train_on: Which tokens of conversations and completions are learned.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        system: str | None = None,
        train_on: TrainOn = "assistant",
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.train_on = train_on
        self._encoder = Encoder(tokenizer)
        self._given_template = chat_template
        self._counts: Counter[str] = Counter()
        self._said: list[str] = []

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template; looked for only when a conversation comes, since plain text needs none."""
        return find_chat_template(self.tokenizer, self._given_template)

    @property
    def chat_template(self) -> str:
        """The Jinja program in use, to be saved beside the model."""
        return self.template.text

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the end token, and the template's end of turn where that is one token."""
        ids = [self.tokenizer.eos_token_id]
        end_of_turn = self.template.end_of_turn
        if end_of_turn and end_of_turn.strip() in self.tokenizer.get_added_vocab():
            ids.append(self.tokenizer.convert_tokens_to_ids(end_of_turn.strip()))
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    def forget_counts(self) -> None:
        """Start the counts in `notes` from nothing, for another set of examples."""
        self._counts.clear()
        self._said.clear()

    @property
    def counts(self) -> Counter[str]:
        """What was done to the examples so far, to be added to those of another process."""
        return self._counts.copy()

    def add_counts(self, counts: Counter[str]) -> None:
        """Count what a renderer in another process has done."""
        self._counts.update(counts)

    def note(self, text: str) -> None:
        """Put a line into `notes`."""
        self._said.append(text)

    @property
    def notes(self) -> list[str]:
        """What was done to the examples so far that is not plain from the data, for the report."""
        notes = []
        if "template" in self.__dict__:
            notes.append(f"chat template: {self.template.origin}")
            if self.template.end_of_turn == "":
                notes.append("the template ends no turn; the end token follows the last answer, so that it is learned")
        if self.tokenizer.eos_token_id is None:
            notes.append("the tokenizer has no end token: plain texts end without one")
        counted = [text.format(self._counts[key]) for key, text in _NOTES.items() if self._counts[key]]
        return notes + counted + self._said

    def render(self, example: Example) -> list[TokenizedExample]:
        """Return an example as tokens and mask; several where the template rewrites earlier answers.

        Raises:
            DataError: The template does not take the conversation, or it cannot be masked; with the example's origin.
        """
        return self.render_batch([example])[0]

    def render_batch(self, examples: Sequence[Example]) -> list[list[TokenizedExample]]:
        """Render many examples at once, which lets the tokenizer use all cores.

        Raises:
            DataError: As in `render`.
        """
        with bounds_kept():
            masked = [self._mask(example) for example in examples]
        origins = [example.origin for example, texts in zip(examples, masked, strict=True) for _ in texts]
        encoded = iter(self._encode([text for texts in masked for text in texts], origins))
        rendered: list[list[TokenizedExample]] = []
        for example, texts in zip(examples, masked, strict=True):
            made = [next(encoded) for _ in texts]
            self._counts["pieces"] += any(text.in_pieces for text in made)
            rendered.append([TokenizedExample(text.input_ids, text.loss_mask, example.origin) for text in made])
        return rendered

    def render_chat(self, messages: Iterable[Message], *, tools: Sequence[Any] | None = None) -> list[int]:
        """Return the tokens from which the model writes its next answer in a conversation.

        Args:
            messages: The turns so far.
            tools: Function schemas.

        Raises:
            DataError: The template does not take the conversation.
        """
        text = self.template.render(self._with_system(tuple(messages)), tools=tools, add_generation_prompt=True)
        return self._encoder.encode_prompt(text, has_frame=False)

    def render_prompt(self, example: Example) -> list[int] | None:
        """Return the tokens before the last answer of an example, or None where nothing is asked."""
        if example.completion is not None:
            return self._encoder.encode_prompt(example.prompt, has_frame=True)
        learned = learned_turns(example.messages or (), example.context_turns)
        if not learned or example.messages is None:
            return None
        return self.render_chat(example.messages[: learned[-1]], tools=example.tools)

    def _encode(self, texts: list[MaskedText], origins: list[str]) -> list[EncodedText]:
        try:
            return self._encoder.encode(texts)
        except DataError:
            # The batch is tried one by one only to name the example.
            for text, origin in zip(texts, origins, strict=True):
                self._named(origin, lambda text=text: self._encoder.encode([text]))
            raise

    def _mask(self, example: Example) -> list[MaskedText]:
        if example.text is not None:
            return [MaskedText(example.text, ((0, len(example.text)),), has_frame=True)]
        if example.completion is not None:
            text = example.prompt + example.completion
            start = 0 if self.train_on == "all" else len(example.prompt)
            return [MaskedText(text, ((start, len(text)),), has_frame=True)]
        assert example.messages is not None, "an example holds messages, a text or a completion"
        return self._named(example.origin, lambda: self._mask_conversation(example))

    def _mask_conversation(self, example: Example) -> list[MaskedText]:
        given = example.messages or ()
        messages = self._with_system(given)
        has_system = given[0]["role"] == "system"
        self._counts["system"] += bool(self.system) and not has_system
        self._counts["folded"] += (bool(self.system) or has_system) and not self.template.takes_system
        # A system turn that was added or folded moves every turn by one.
        moved = len(messages) - len(given)
        context = frozenset(turn + moved for turn in example.context_turns)
        learned = learned_turns(messages, context)
        conversation = Conversation(messages, example.tools, learned)
        if self.train_on == "all":
            texts = [mask_everything(self.template, conversation)]
        else:
            texts = mask_answers(self.template, conversation)
            self._count_turns(messages, learned, context, texts)
        self._count_left_out(messages[: learned[-1] if learned else None], texts[-1].text)
        if self._control_tokens is not None:
            self._counts["control"] += any(self._control_tokens.search(message["content"]) for message in messages)
        return texts

    def _count_turns(
        self,
        messages: Sequence[Message],
        learned: tuple[int, ...],
        context: frozenset[int],
        texts: list[MaskedText],
    ) -> None:
        self._counts[texts[0].way] += len(texts)
        self._counts["greeting"] += sum(
            message["role"] == "assistant" and turn not in learned and turn not in context
            for turn, message in enumerate(messages)
        )
        self._counts["unanswered"] += bool(learned) and messages[-1]["role"] != "assistant"

    def _count_left_out(self, messages: Sequence[Message], text: str) -> None:
        read = [message for message in messages if message["role"] != "assistant"]
        left_out = [message for message in read if message["content"].strip() not in text]
        users = [message for message in read if message["role"] == "user"]
        if users and all(message in left_out for message in users):
            raise DataError(
                f"the chat template ({self.template.origin}) does not write the words of the user. It may be made for "
                "images, or for turns of another form. Give another one with --data.chat_template (chatml and headings "
                "are built in)."
            )
        self._counts["left out"] += len(left_out)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Add the configured system prompt where there is none, and fold it where the template takes none."""
        if self.system and messages and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self.system}, *messages)
        if not messages or messages[0]["role"] != "system" or self.template.takes_system:
            return messages
        first, rest = messages[0], messages[1:]
        asked = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
        if asked is None:
            raise DataError(
                "the chat template takes no system turn and there is no user turn to put its words into. Add a user "
                "turn, or give another template with --data.chat_template."
            )
        joined = {**rest[asked], "content": first["content"] + "\n\n" + rest[asked]["content"]}
        return (*rest[:asked], joined, *rest[asked + 1 :])

    @functools.cached_property
    def _control_tokens(self) -> re.Pattern[str] | None:
        tokens = {token for token in self.tokenizer.all_special_tokens if token.strip()}
        end_of_turn = (self.template.end_of_turn or "").strip()
        if end_of_turn:
            tokens.add(end_of_turn)
        return re.compile("|".join(map(re.escape, sorted(tokens)))) if tokens else None

    def _named(self, origin: str, make: Any) -> Any:
        """Call, and put the example's origin in front of what goes wrong."""
        try:
            return make()
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error


def build_renderer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    system: str | None = None,
    train_on: TrainOn = "assistant",
) -> Renderer:
    """Return a renderer for a model's tokenizer.

    Args:
        tokenizer: The tokenizer; not changed. Save `renderer.chat_template` with the model.
        chat_template: A Jinja program, its path or a name; None for the tokenizer's own or a built-in one.
        system: System prompt for conversations that have none.
        train_on: "assistant" for answers only, "all" for every token.

    Raises:
        DataError: `train_on` is neither.
    """
    if train_on not in ("assistant", "all"):
        raise DataError(f"train_on is {train_on!r}, must be 'assistant' or 'all'.")
    return Renderer(tokenizer, chat_template=chat_template, system=system, train_on=train_on)
