"""The shop's tickets keep their promises: well-formed, enough of them, and the held-out part asked in other words."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from examples.shop.scoring import HELD_OUT, TICKETS, Question, load_questions, states_fact

SHARED_WORDS = 6


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """Return every six words in a row, without case and punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return {tuple(words[start : start + SHARED_WORDS]) for start in range(len(words) - SHARED_WORDS + 1)}


@pytest.fixture(scope="module")
def tickets() -> list[tuple[str, str]]:
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows_of(TICKETS)]


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return load_questions()


@pytest.mark.parametrize("path", [TICKETS, HELD_OUT], ids=lambda path: path.stem)
def test_every_line_is_a_question_and_an_answer(path: Path) -> None:
    for row in rows_of(path):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        for message in row["messages"]:
            assert message.keys() == {"role", "content"}
            assert message["content"] == message["content"].strip()
            assert 2 <= len(message["content"].split()) <= 40


def test_there_are_enough(tickets: list[tuple[str, str]], questions: list[Question]) -> None:
    assert len(tickets) >= 300
    assert len(questions) >= 60
    assert 35 <= len({asked.facts for asked in questions}) <= 45


def test_nothing_is_asked_twice(tickets: list[tuple[str, str]], questions: list[Question]) -> None:
    asked = Counter([question for question, _ in tickets] + [held.question for held in questions])
    assert [question for question, times in asked.items() if times > 1] == []


def test_held_out_questions_share_no_six_words_in_a_row_with_a_ticket(
    tickets: list[tuple[str, str]], questions: list[Question]
) -> None:
    known: dict[tuple[str, ...], str] = {run: question for question, _ in tickets for run in runs_of_words(question)}
    shared = {held.question: known[run] for held in questions for run in runs_of_words(held.question) if run in known}
    assert shared == {}


def test_held_out_questions_do_not_contain_their_fact(questions: list[Question]) -> None:
    assert [held.question for held in questions if states_fact(held.question, held.facts)] == []


def test_held_out_answers_state_their_fact(questions: list[Question]) -> None:
    assert [held.question for held in questions if not states_fact(held.answer, held.facts)] == []


def test_every_held_out_answer_is_taught_in_many_wordings(
    tickets: list[tuple[str, str]], questions: list[Question]
) -> None:
    wordings = defaultdict(set)
    for question, answer in tickets:
        wordings[answer].add(question)
    assert [held.answer for held in questions if len(wordings[held.answer]) < 5] == []


def test_tickets_do_not_contain_the_fact_they_ask_for(
    tickets: list[tuple[str, str]], questions: list[Question]
) -> None:
    facts = {held.facts for held in questions}
    told = [
        (question, spellings)
        for question, answer in tickets
        for spellings in facts
        if states_fact(answer, spellings) and states_fact(question, spellings)
    ]
    # The Pipit's price and the Gannet's volume are asked for by name, and answered with the name.
    assert [pair for pair in told if pair[1] not in (("Pipit",), ("Gannet",))] == []
