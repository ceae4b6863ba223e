"""Several processes that render: the same tokens, order and errors as one, which goes on alone when they die."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.data import rendering
from halfbyte.data.examples import Example
from halfbyte.data.render import Renderer, build_renderer
from halfbyte.data.rendering import iter_rendered
from halfbyte.errors import DataError
from tests.data.test_prepare import pair

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "BATCH_EXAMPLES", 4)


def flat(examples: list[Example], renderer: Renderer, num_processes: int) -> list[tuple[str, list[int], list[bool]]]:
    """Render, and return what came in the order in which it came."""
    made = []
    for batch, rendered in iter_rendered(examples, renderer, num_processes=num_processes):
        for example, texts in zip(batch, rendered, strict=True):
            assert all(text.origin == example.origin for text in texts)
            made += [(text.origin, text.input_ids.tolist(), text.loss_mask.tolist()) for text in texts]
    return made


def conversations(count: int) -> list[Example]:
    return [pair("Where? " * (n % 3 + 1), "order " * (n % 7 + 1), f"a.jsonl:{n}") for n in range(count)]


def test_iter_rendered_gives_the_same_from_several_processes(byte_level: PreTrainedTokenizerFast) -> None:
    examples = conversations(50)
    alone, shared = build_renderer(byte_level), build_renderer(byte_level)
    assert flat(examples, alone, 1) == flat(examples, shared, 3)
    assert alone.notes == shared.notes
    assert "50 conversations masked by rendering their prefixes" in shared.notes


def test_iter_rendered_gives_the_error_of_the_first_example(byte_level: PreTrainedTokenizerFast) -> None:
    text = (
        "{% for m in messages %}{{ raise_exception('no') if m.content == 'bad' else m.role + m.content }}{% endfor %}"
    )
    examples = conversations(50)
    for n in (41, 22):
        examples[n] = pair("bad", "order", f"a.jsonl:{n}")
    with pytest.raises(DataError, match=r"a\.jsonl:22: "):
        flat(examples, build_renderer(byte_level, chat_template=text), 3)


class DyingRenderer(Renderer):
    """Is killed with the process that it is in, at one example, as the system kills when memory runs out."""

    parent = os.getpid()

    def render_batch(self, examples: Any) -> Any:
        if os.getpid() != self.parent and any(example.origin == "a.jsonl:30" for example in examples):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().render_batch(examples)


def test_iter_rendered_goes_on_alone_when_a_process_dies(byte_level: PreTrainedTokenizerFast) -> None:
    examples = conversations(50)
    dying = DyingRenderer(byte_level)
    assert flat(examples, dying, 2) == flat(examples, build_renderer(byte_level), 1)
    assert "50 conversations masked by rendering their prefixes" in dying.notes
    assert any("one went on alone" in note for note in dying.notes)


def test_iter_rendered_of_nothing(byte_level: PreTrainedTokenizerFast) -> None:
    assert flat([], build_renderer(byte_level), 2) == []


def test_token_arrays_are_sent_in_one_piece(byte_level: PreTrainedTokenizerFast) -> None:
    rendered = build_renderer(byte_level).render_batch(conversations(3))
    tokens = rendering._Tokens.join(rendered, build_renderer(byte_level).counts)
    again = tokens.split(conversations(3))
    for before, after in zip(rendered, again, strict=True):
        for one, other in zip(before, after, strict=True):
            assert np.array_equal(one.input_ids, other.input_ids)
            assert np.array_equal(one.loss_mask, other.loss_mask)
