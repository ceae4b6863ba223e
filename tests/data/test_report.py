"""The report of the data, and the pieces that the display is coloured by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.examples import Dropped, TokenizedExample
from halfbyte.data.report import Cut, DataReport, token_spans
from tests.data.conftest import TOKENIZERS


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_histogram_counts_each_example_once(lengths: list[int]) -> None:
    bins = DataReport(lengths=tuple(lengths), num_trained_tokens=1, max_length=5000).histogram()
    for item in bins:
        assert item.num_examples == sum(item.first <= length <= item.last for length in lengths)
    assert sum(item.num_examples for item in bins) == len(lengths)
    assert bins[-1].last == max(lengths)
    assert len(bins) <= 10


def test_data_report_reads_well() -> None:
    report = DataReport(
        lengths=(5, 7, 7, 20),
        num_trained_tokens=13,
        max_length=20,
        cut=(Cut("a.jsonl:4", 25, 5),),
        dropped=tuple(Dropped(f"a.jsonl:{n}", "all of it is prompt, nothing to learn") for n in range(7)),
        num_continued=2,
        notes=("chat template: the tokenizer's own",),
    )
    assert str(report).splitlines() == [
        "4 examples, 39 tokens, 13 of them learned (33%)",
        "tokens an example: 5 to 20, half up to 7, 95% up to 18",
        "   5 to  6  ###############                1",
        "   7 to  8  ############################## 2",
        "   9 to 10                                 0",
        "  11 to 12                                 0",
        "  13 to 14                                 0",
        "  15 to 16                                 0",
        "  17 to 18                                 0",
        "  19 to 20  ###############                1",
        "2 further examples continue documents of over 20 tokens",
        "1 examples have over 20 tokens and were cut; 5 tokens to learn were lost "
        "(raise --data.max_length to keep them):",
        "  a.jsonl:4: 25 tokens, lost 5 to learn",
        "7 examples left out: all of it is prompt, nothing to learn",
        "  a.jsonl:0",
        "  a.jsonl:1",
        "  a.jsonl:2",
        "  a.jsonl:3",
        "  a.jsonl:4",
        "  ... and 2 more",
        "chat template: the tokenizer's own",
    ]
    assert report.trained_share == 13 / 39


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_token_spans_are_the_whole_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("Where is my order? On its way \u00e9.", add_special_tokens=False)["input_ids"]
    for seam in (0, 3, len(ids)):
        mask = [False] * seam + [True] * (len(ids) - seam)
        spans = token_spans(tokenizer, TokenizedExample(ids, mask, "x"))
        assert "".join(span.text for span in spans) == tokenizer.decode(ids)
        assert [span.is_trained for span in spans] == [value for value in (False, True) if value in mask]
