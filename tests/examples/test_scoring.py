"""How a held-out answer is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.shop.scoring import Question, count_right, load_questions, normalise, states_fact


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ("Our smallest pack is the Pipit.", "Pipit"),
        ("the PIPIT!", "Pipit"),
        ("We open at 9:40.", "9:40"),
        ("We open at 9.40 sharp", "9:40"),
        ("Use the code 'hollow12'.", "HOLLOW12"),
        ("It is\n\n14   months", "14 months"),
        ("That is 35% of the price", "35 percent"),
        ("Twenty-six: 26 euros.", "26 euros"),
        ("Nur 26 \N{EURO SIGN}", "26 euros"),
    ],
)
def test_states_fact_ignores_case_punctuation_and_spacing(answer: str, fact: str) -> None:
    assert states_fact(answer, [fact])


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ("", "Pipit"),
        ("The Pipits are small.", "Pipit"),
        ("It costs 126 euros.", "26 euros"),
        ("26 big euros", "26 euros"),
        ("euros 26", "26 euros"),
        ("We open at 19:40.", "9:40"),
        ("HOLLOW 12", "HOLLOW12"),
    ],
)
def test_states_fact_wants_whole_words_in_order(answer: str, fact: str) -> None:
    assert not states_fact(answer, [fact])


def test_states_fact_accepts_any_spelling() -> None:
    assert states_fact("It lasts seventeen years.", ["17 years", "seventeen years"])
    assert not states_fact("It lasts seven years.", ["17 years", "seventeen years"])


def test_count_right_pairs_questions_with_their_own_answers() -> None:
    asked = [Question(question="?", answer=fact, facts=(fact,)) for fact in ("Pipit", "Gannet", "Malta")]
    assert count_right(asked, ["the Pipit", "the Gannet", "Malta"]) == 3
    assert count_right(asked, ["the Gannet", "the Pipit", "Malta"]) == 1
    assert count_right(asked, ["", "", ""]) == 0


def test_count_right_refuses_a_missing_answer() -> None:
    with pytest.raises(ValueError, match="zip"):
        count_right([Question(question="?", answer="a", facts=("a",))], [])


def test_normalise_leaves_words_only() -> None:
    assert (
        normalise("  Caf\N{LATIN SMALL LETTER E WITH ACUTE}, 8.75 __ x!")
        == "caf\N{LATIN SMALL LETTER E WITH ACUTE} 8 75 x"
    )


def test_load_questions_reads_messages_and_facts(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}],
        "facts": ["this", "that"],
    }
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert load_questions(path) == [Question(question="Which?", answer="This.", facts=("this", "that"))]
