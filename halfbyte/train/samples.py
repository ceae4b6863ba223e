"""Held-out questions with the answers of the base model and of the tuned one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.data import Example, Renderer
from halfbyte.models.generate import GenerationOptions, generate_text
from halfbyte.nn import adapters_disabled


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A held-out question."""

    origin: str
    text: str
    """What the person asks last."""
    expected: str
    """The answer that the example gives."""
    prompt_ids: list[int]
    """All that the model reads before it answers."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A question and what two models say to it."""

    origin: str
    question: str
    expected: str
    before: str
    after: str


def choose_questions(examples: Sequence[Example], renderer: Renderer, *, count: int, max_tokens: int) -> list[Question]:
    """Return up to `count` questions, spread evenly over the examples; plain texts ask nothing.

    Args:
        examples: Held-out examples.
        renderer: Turns them into the tokens that the model reads.
        count: How many.
        max_tokens: Tokens that a prompt may have.
    """
    asking = [example for example in examples if example.text is None]
    chosen: list[Question] = []
    for number in range(min(count, len(asking))):
        example = asking[number * len(asking) // min(count, len(asking))]
        prompt_ids = renderer.render_prompt(example)
        if prompt_ids and len(prompt_ids) <= max_tokens:
            question, expected = _words(example)
            chosen.append(Question(origin=example.origin, text=question, expected=expected, prompt_ids=prompt_ids))
    return chosen


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    by_base: bool,
) -> list[str]:
    """Return the answers, without adapters where the base is asked."""
    if not questions:
        return []
    prompts = [question.prompt_ids for question in questions]
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    if by_base:
        with adapters_disabled(model):
            return generate_text(model, tokenizer, prompts, options=options)
    return generate_text(model, tokenizer, prompts, options=options)


def printable(text: str) -> str:
    """Return text with control characters written out: what a file or a model says shall not command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _words(example: Example) -> tuple[str, str]:
    if example.completion is not None:
        return example.prompt.strip(), example.completion.strip()
    messages = list(example.messages or ())
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    last = answers[-1]
    asked = [message["content"] for message in messages[:last] if message["role"] == "user"]
    return str(asked[-1] if asked else "").strip(), str(messages[last]["content"]).strip()
