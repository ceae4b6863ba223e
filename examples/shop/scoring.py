"""Held-out questions, and how an answer to one is scored.

Each line of held_out.jsonl holds a question, the answer that the shop would give, and `facts`: the spellings under
which its fact is accepted ("17 years", "seventeen years"). An answer is right if it contains one of them, word by word;
case, punctuation and spacing do not count. The facts are invented, so a model that has not read the tickets can only
hit one by chance.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
TICKETS = FOLDER / "tickets.jsonl"
HELD_OUT = FOLDER / "held_out.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One held-out question."""

    question: str
    answer: str
    """What the shop would say."""
    facts: tuple[str, ...]
    """Spellings of the fact that a right answer contains."""


def load_questions(path: Path = HELD_OUT) -> list[Question]:
    """Return the held-out questions of a file, in its order."""
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked, answered = row["messages"]
        questions.append(Question(question=asked["content"], answer=answered["content"], facts=tuple(row["facts"])))
    return questions


def states_fact(answer: str, facts: Sequence[str]) -> bool:
    """Return whether an answer contains one of the spellings of a fact."""
    words = f" {normalise(answer)} "
    return any(f" {normalise(fact)} " in words for fact in facts)


def count_right(questions: Sequence[Question], answers: Sequence[str]) -> int:
    """Return how many answers state the fact that was asked for."""
    return sum(states_fact(answer, asked.facts) for asked, answer in zip(questions, answers, strict=True))


def normalise(text: str) -> str:
    """Return the words and numbers of a text in lower case, one space between them; signs of units are spelled out."""
    text = text.lower().replace("%", " percent ").replace("\N{EURO SIGN}", " euros ")
    return " ".join(re.findall(r"[^\W_]+", text))
