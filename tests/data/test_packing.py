"""Packed rows: every token once, no row over budget, nothing of one example in another."""

from __future__ import annotations

import doctest
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import halfbyte.data.packing
from halfbyte.data.examples import TokenizedExample
from halfbyte.data.packing import PackedDataset, make_row, pack_best_fit
from halfbyte.errors import DataError

BUDGET = 24
lengths_lists = st.lists(st.integers(1, BUDGET), max_size=60)
PAD_ID = 9


@st.composite
def examples_lists(draw: st.DrawFn) -> list[TokenizedExample]:
    """Draw examples whose tokens say which example and position they are."""
    examples = []
    for number, length in enumerate(draw(st.lists(st.integers(2, BUDGET), min_size=1, max_size=20))):
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        examples.append(TokenizedExample(np.arange(length) + 1000 * (number + 1), mask, str(number)))
    return examples


def pack_by_search(lengths: list[int], budget: int) -> list[list[int]]:
    """Best fit decreasing by looking at every row: the definition."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rows.append([])
            rooms.append(budget)
            fitting = [len(rows) - 1]
        best = min(fitting, key=lambda row: rooms[row])
        rows[best].append(index)
        rooms[best] -= lengths[index]
    return rows


@given(lengths=lengths_lists)
def test_pack_best_fit_holds_each_example_once_within_the_budget(lengths: list[int]) -> None:
    rows = pack_best_fit(lengths, BUDGET)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= BUDGET for row in rows)


@given(lengths=lengths_lists)
def test_pack_best_fit_is_best_fit_decreasing(lengths: list[int]) -> None:
    # Rows with equal room are equally good, so what they hold may differ; how full they are may not.
    def fills(rows: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[index] for index in row) for row in rows)

    assert fills(pack_best_fit(lengths, BUDGET)) == fills(pack_by_search(lengths, BUDGET))


@given(lengths=lengths_lists, seed=st.integers(0, 5))
def test_pack_best_fit_needs_as_many_rows_in_any_order(lengths: list[int], seed: int) -> None:
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    assert len(pack_best_fit(shuffled, BUDGET)) == len(pack_best_fit(lengths, BUDGET))


def test_pack_best_fit_fills_rows_of_chat_lengths() -> None:
    generator = random.Random(0)
    lengths = [min(1024, max(8, int(generator.lognormvariate(5.0, 0.7)))) for _ in range(20_000)]
    rows = pack_best_fit(lengths, 1024)
    assert sum(lengths) / (len(rows) * 1024) > 0.995


def test_pack_best_fit_explains_an_example_that_is_too_long() -> None:
    with pytest.raises(DataError, match="example 1 has 25 tokens; a packed row takes 1 to 24"):
        pack_best_fit([3, 25], BUDGET)
    with pytest.raises(DataError, match="example 0 has 0 tokens"):
        pack_best_fit([0], BUDGET)


def test_packing_docstring_is_true() -> None:
    result = doctest.testmod(halfbyte.data.packing)
    assert result.failed == 0
    assert result.attempted > 0


@given(examples=examples_lists())
def test_packed_dataset_rows_hold_the_examples_as_they_are(examples: list[TokenizedExample]) -> None:
    dataset = PackedDataset(examples, row_tokens=BUDGET, pad_id=PAD_ID, seed=1)
    seen = []
    for index in range(len(dataset)):
        row = dataset[index]
        assert row.input_ids.shape == row.labels.shape == row.position_ids.shape == (BUDGET,)
        assert sum(row.lengths) == BUDGET
        bounds = np.cumsum([0, *row.lengths])
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            assert row.position_ids[start:stop].tolist() == list(range(stop - start))
            if number == len(row.origins):
                assert (row.input_ids[start:stop] == PAD_ID).all()
                assert (row.labels[start:stop] == -100).all()
                continue
            example = examples[int(row.origins[number])]
            seen.append(int(example.origin))
            assert row.input_ids[start:stop].tolist() == example.input_ids.tolist()
            assert row.labels[start:stop].tolist() == example.labels().tolist()
        assert len(row.lengths) - len(row.origins) in (0, 1)
    assert sorted(seen) == list(range(len(examples)))


def test_packed_dataset_order_is_a_function_of_seed_and_epoch() -> None:
    generator = random.Random(0)
    examples = [
        TokenizedExample(np.full(length, number), [True] * length, str(number))
        for number, length in enumerate(generator.choices(range(2, BUDGET), k=200))
    ]

    def order(seed: int, epochs: list[int]) -> list[tuple[str, ...]]:
        dataset = PackedDataset(examples, row_tokens=BUDGET, pad_id=PAD_ID, seed=seed)
        sizes = {len(dataset)}
        for epoch in epochs:
            dataset.set_epoch(epoch)
            sizes.add(len(dataset))
        assert len(sizes) == 1
        return [dataset[index].origins for index in range(len(dataset))]

    assert order(1, [0, 1, 2]) == order(1, [2])
    assert order(1, [2]) != order(1, [3])
    assert order(1, [2]) != order(2, [2])
    assert {frozenset(row) for row in order(1, [2])} != {frozenset(row) for row in order(1, [3])}
    longest = [max(len(examples[int(origin)]) for origin in row) for row in order(1, [2])]
    assert longest != sorted(longest, reverse=True)


def test_packed_dataset_keeps_its_order_for_evaluation() -> None:
    examples = [TokenizedExample(np.full(length, 7), [True] * length, "x") for length in (5, 20, 10)]
    dataset = PackedDataset(examples, row_tokens=BUDGET, pad_id=PAD_ID, is_shuffled=False)
    before = [dataset[index].lengths for index in range(len(dataset))]
    dataset.set_epoch(3)
    assert [dataset[index].lengths for index in range(len(dataset))] == before == [(20, 4), (10, 5, 9)]
    assert math.isclose(dataset.fill, 35 / 48)


def test_make_row_without_padding_has_no_document_for_it() -> None:
    row = make_row([TokenizedExample([1, 2], [True, True], "x")], row_tokens=2, pad_id=PAD_ID)
    assert row.lengths == (2,)
    assert row.input_ids.dtype == row.labels.dtype == row.position_ids.dtype == np.int64
