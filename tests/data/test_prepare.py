"""Fitting examples into the context, and the account of what was lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.data import rendering
from halfbyte.data.examples import Example
from halfbyte.data.prepare import prepare
from halfbyte.data.render import Renderer, build_renderer
from halfbyte.errors import DataError
from tests.data.conftest import make_byte_level


def pair(prompt: str, completion: str, origin: str = "a.jsonl:1") -> Example:
    """Make a conversation of one exchange."""
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Example(origin=origin, messages=messages)


@pytest.fixture
def renderer(byte_level: PreTrainedTokenizerFast) -> Renderer:
    """A renderer with the built-in template."""
    return build_renderer(byte_level)


def test_prepare_counts_what_is_learned(renderer: Renderer) -> None:
    prepared = prepare([pair("Where?", "order"), pair("How?", "return")], renderer, max_length=64)
    assert prepared.report.num_examples == 2
    assert prepared.report.num_tokens == sum(len(example) for example in prepared.examples)
    assert prepared.report.num_trained_tokens == sum(int(example.loss_mask.sum()) for example in prepared.examples)
    assert prepared.report.notes[0].startswith("chat template: the built-in 'chatml'")
    assert prepared.report.max_length == 64


def test_prepare_batches_give_what_single_examples_give(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [pair("Where?", "order " * (n % 7 + 1), f"a:{n}") for n in range(20)]
    monkeypatch.setattr(rendering, "BATCH_EXAMPLES", 6)
    prepared = prepare(examples, renderer, max_length=64)
    for example, made in zip(examples, prepared.examples, strict=True):
        (single,) = renderer.render(example)
        assert made.origin == example.origin
        assert np.array_equal(made.input_ids, single.input_ids)
        assert np.array_equal(made.loss_mask, single.loss_mask)


def test_prepare_tells_how_far_it_is(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "BATCH_EXAMPLES", 2)
    told: list[tuple[int, int]] = []
    prepare([pair("Where?", "order")] * 5, renderer, max_length=64, on_progress=lambda *done: told.append(done))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_prepare_cuts_and_reports(renderer: Renderer) -> None:
    long = pair("Where?", "order " * 30, "a.jsonl:2")
    (whole,) = renderer.render(long)
    prepared = prepare([pair("Where?", "order"), long], renderer, max_length=32)
    assert len(prepared.examples[1]) == 32
    assert np.array_equal(prepared.examples[1].input_ids, whole.input_ids[:32])
    (cut,) = prepared.report.cut
    assert (cut.origin, cut.num_tokens) == ("a.jsonl:2", len(whole))
    assert cut.num_lost_trained_tokens == len(whole) - 32 == prepared.report.num_lost_trained_tokens
    assert "1 examples have over 32 tokens and were cut" in str(prepared.report)
    assert f"a.jsonl:2: {len(whole)} tokens, lost {len(whole) - 32} to learn" in str(prepared.report)


def test_prepare_drops_or_refuses_what_is_too_long(renderer: Renderer) -> None:
    examples = [pair("Where?", "order"), pair("Where?", "order " * 30, "a.jsonl:2")]
    prepared = prepare(examples, renderer, max_length=32, overlong="drop")
    assert len(prepared.examples) == 1
    assert [tuple(dropped) for dropped in prepared.report.dropped] == [("a.jsonl:2", "over 32 tokens")]
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens, over the 32 allowed. Raise --data\.max_length"):
        prepare(examples, renderer, max_length=32, overlong="error")


def test_prepare_drops_an_example_that_is_all_prompt(renderer: Renderer) -> None:
    unanswered = Example("a.jsonl:2", messages=({"role": "user", "content": "Where?"},))
    long_prompt = pair("where " * 60, "order", "a.jsonl:3")
    prepared = prepare([pair("Where?", "order"), unanswered, long_prompt], renderer, max_length=32)
    assert [tuple(dropped) for dropped in prepared.report.dropped] == [
        ("a.jsonl:2", "all of it is prompt, nothing to learn"),
        ("a.jsonl:3", "nothing to learn in its first 32 tokens"),
    ]
    assert "1 examples left out: all of it is prompt, nothing to learn\n  a.jsonl:2" in str(prepared.report)
    assert prepared.report.cut == ()


def test_prepare_continues_a_document_so_that_each_token_is_learned_once(byte_level: PreTrainedTokenizerFast) -> None:
    text = "Where is my order? " * 20
    renderer = build_renderer(byte_level)
    (whole,) = renderer.render(Example("a.txt:1", text=text))
    for max_length in (2, 3, 16, 17, len(whole) - 1, len(whole)):
        prepared = prepare([Example("a.txt:1", text=text, is_document=True)], renderer, max_length=max_length)
        targets = [label for example in prepared.examples for label in example.labels().tolist() if label != -100]
        assert targets == whole.input_ids[1:].tolist()
        assert max(map(len, prepared.examples)) <= max_length
        assert prepared.report.num_continued == len(prepared.examples) - 1
        assert prepared.report.cut == ()


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "there are no examples"),
        (
            [Example("a:1", messages=({"role": "user", "content": "Where?"},))],
            {},
            "nothing is left to learn in 1 examples",
        ),
        (
            [pair("where " * 60, "order")],
            {},
            r"nothing is left.*a\.jsonl:1: nothing to learn in its first 32.*max_length=32",
        ),
        ([pair("a", "b")], {"overlong": "shorten"}, "overlong is 'shorten', must be"),
        ([pair("a", "b")], {"max_length": 1}, "max_length is 1, must be at least 2"),
    ],
)
def test_prepare_explains_what_is_wrong(examples: list[Example], options: dict[str, Any], message: str) -> None:
    renderer = build_renderer(make_byte_level())
    with pytest.raises(DataError, match=message):
        prepare(examples, renderer, **{"max_length": 32, **options})


def test_prepare_counts_notes_of_this_set_only(renderer: Renderer) -> None:
    prepare([pair("a", "b")] * 3, renderer, max_length=32)
    assert prepare([pair("a", "b")], renderer, max_length=32).report.notes[1] == (
        "1 conversations masked by rendering their prefixes"
    )
