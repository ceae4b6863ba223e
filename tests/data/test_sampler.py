"""Orders of examples: each once, by seed and epoch, and similar lengths together."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.sampler import LengthGroupedSampler, ShuffledSampler, make_order


@given(num_examples=st.integers(0, 40), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_shuffled_sampler_gives_each_example_once(num_examples: int, seed: int, epoch: int) -> None:
    sampler = ShuffledSampler(num_examples, seed=seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == num_examples
    assert sorted(sampler) == list(range(num_examples))
    assert list(sampler) == make_order(num_examples, seed=seed, epoch=epoch)


def test_make_order_follows_seed_and_epoch() -> None:
    orders = {tuple(make_order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(lengths=st.lists(st.integers(1, 99), max_size=200), batch_size=st.integers(1, 5), epoch=st.integers(0, 2))
def test_length_grouped_sampler_gives_each_example_once(lengths: list[int], batch_size: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size=batch_size, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) == list(range(len(sampler)))
    assert order == list(sampler)
    if len(lengths) >= batch_size:
        assert max(lengths) in [lengths[index] for index in order[:batch_size]]


def test_length_grouped_sampler_keeps_a_batch_that_is_not_full_last() -> None:
    lengths = [9, *[3] * 4, *[2] * 4, *[1] * 4]
    sampler = LengthGroupedSampler(lengths, batch_size=4, seed=0)
    for epoch in range(10):
        sampler.set_epoch(epoch)
        in_order = [lengths[index] for index in sampler]
        batches = [tuple(in_order[at : at + 4]) for at in range(0, 13, 4)]
        assert batches[0] == (9, 3, 3, 3)
        assert batches[-1] == (1,)
        assert sorted(batches[1:3]) == [(2, 1, 1, 1), (3, 2, 2, 2)]


def test_length_grouped_sampler_pads_little() -> None:
    generator = random.Random(0)
    lengths = [max(8, int(generator.lognormvariate(5.0, 0.7))) for _ in range(2000)]

    def padding(order: list[int]) -> float:
        batches = [order[at : at + 8] for at in range(0, len(order), 8)]
        padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
        return 1 - sum(lengths) / padded

    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=0)
    assert padding(list(sampler)) < 0.05 < 0.4 < padding(make_order(2000, seed=0, epoch=0))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
