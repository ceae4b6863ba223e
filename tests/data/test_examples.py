"""Tokens, masks and labels of one example."""

from __future__ import annotations

import numpy as np

from halfbyte.data.examples import Example, TokenizedExample


def test_tokenized_example_labels_are_shifted() -> None:
    example = TokenizedExample([5, 6, 7, 8], [True, False, True, True], "x")
    assert example.labels().tolist() == [-100, 7, 8, -100]
    assert example.labels(ignore_index=-1).tolist() == [-1, 7, 8, -1]
    # The first token has nothing before it, so it is no target although it is marked.
    assert example.num_trained_tokens == 2


def test_tokenized_example_window_is_an_example_of_its_own() -> None:
    example = TokenizedExample(range(6), [True] * 6, "x")
    window = example.window(2, 4)
    assert (window.input_ids.tolist(), window.num_trained_tokens, window.origin) == ([2, 3], 1, "x")
    assert not np.shares_memory(window.input_ids, example.input_ids)


def test_example_identity_is_its_content() -> None:
    messages = ({"role": "user", "content": "a"},)
    assert Example("x", messages=messages).identity() == Example("y", messages=messages).identity()
    others = [
        Example("x", messages=messages, tools=({},)),
        Example("x", messages=({"role": "user", "content": "b"},)),
        Example("x", text="a"),
        Example("x", completion="a"),
        Example("x", prompt="a", completion=""),
    ]
    assert len({example.identity() for example in others}) == len(others)
