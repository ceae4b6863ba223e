"""Held-out examples: by seed, and never the twin of a training example."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.examples import Example
from halfbyte.data.split import split_held_out
from halfbyte.errors import DataError


def make(texts: list[str]) -> list[Example]:
    """Make examples, told apart by their origin."""
    return [Example(origin=f"a:{number}", text=text) for number, text in enumerate(texts)]


def split_as_before(texts: list[str], fraction: float, seed: int) -> list[int]:
    """Return which of these are held out by the definition in full: runs that go on must find the same."""
    wanted = round(fraction * len(texts))
    if fraction > 0 and len(texts) >= 10:
        wanted = max(wanted, 1)
    wanted = min(wanted, len(texts) - 1)
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text, []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    held_out: list[int] = []
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out += group
    if wanted > 0 and not held_out:
        held_out = min(shuffled, key=len)
    return sorted(held_out)


@given(
    texts=st.lists(st.text("abcdefgh", max_size=2), max_size=80).filter(lambda texts: len(set(texts)) != 1),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_split_held_out_is_the_one_it_has_always_been(texts: list[str], fraction: float, seed: int) -> None:
    examples = make(texts)
    expected = split_as_before(texts, fraction, seed)
    training, held_out = split_held_out(examples, fraction, seed)
    assert held_out == [examples[index] for index in expected]
    assert training == [example for index, example in enumerate(examples) if index not in expected]


def test_split_held_out_of_fixed_examples() -> None:
    examples = make([str(number % 37) for number in range(60)])
    held_out = split_held_out(examples, 0.1, 7)[1]
    assert [example.origin for example in held_out] == ["a:5", "a:14", "a:19", "a:42", "a:51", "a:56"]


@given(
    texts=st.lists(st.sampled_from("abcdefghijklmnop"), min_size=10, max_size=60).filter(lambda t: len(set(t)) > 1),
    fraction=st.floats(0.001, 0.9),
    seed=st.integers(0, 3),
)
def test_split_held_out_keeps_equal_examples_together(texts: list[str], fraction: float, seed: int) -> None:
    examples = make(texts)
    training, held_out = split_held_out(examples, fraction, seed)
    assert sorted([*training, *held_out], key=lambda example: int(example.origin[2:])) == examples
    assert not {example.text for example in training} & {example.text for example in held_out}
    assert training
    assert held_out
    assert split_held_out(examples, fraction, seed) == (training, held_out)


def test_split_held_out_takes_the_share_and_follows_the_seed() -> None:
    examples = make([str(number) for number in range(200)])
    splits = [split_held_out(examples, 0.05, seed)[1] for seed in range(3)]
    assert [len(held_out) for held_out in splits] == [10, 10, 10]
    assert splits[0] != splits[1]
    assert splits[0] == sorted(splits[0], key=lambda example: int(example.origin[2:]))


def test_split_held_out_of_few_examples() -> None:
    assert split_held_out(make(["a"]), 0.5, 0)[1] == []
    assert split_held_out(make(list("abc")), 0.05, 0)[1] == []
    assert len(split_held_out(make(list("abcdefghij")), 0.001, 0)[1]) == 1
    assert split_held_out(make(list("abcdefghijkl")), 0.0, 0)[1] == []
    assert split_held_out([], 0.5, 0) == ([], [])


def test_split_held_out_explains_what_is_wrong() -> None:
    with pytest.raises(DataError, match="all examples are equal"):
        split_held_out(make(["a"] * 12), 0.1, 0)
    for fraction in (-0.1, 1.0):
        with pytest.raises(DataError, match="must be at least 0 and below 1"):
            split_held_out(make(["a"]), fraction, 0)
