"""Dropout by counter: the hash bit for bit, its statistics, and the two operations."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.counter_dropout import CounterDropout, DropoutSeeds, drop_copy, keep_mask_reference
from tests.ops.fused_cases import DROPOUT, Place, assert_untouched_beside, expected_keep

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SEED = pytest.mark.parametrize("seed", [0, 1, 77, 2**31 - 1])
# Thresholds of one and of half the range, below and above it, and the largest there is.
PROBABILITY = pytest.mark.parametrize("probability", [2.0**-32, 0.05, 0.5, 0.9, 1 - 2.0**-40])


@SEED
@PROBABILITY
def test_the_mask_is_that_of_32_bit_arithmetic(seed: int, probability: float) -> None:
    dropout = CounterDropout(seed, probability)
    if dropout.threshold < 2**32 - 1:
        assert keep_mask_reference((70, 501), dropout, device="cpu").double().equal(expected_keep((70, 501), dropout))
    else:
        assert not keep_mask_reference((70, 501), dropout, device="cpu").any()


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(probability: float) -> None:
    num = 1 << 20
    for seed in (0, 1, 2, 123456789):
        dropped = num - int(keep_mask_reference((1024, 1024), CounterDropout(seed, probability), device="cpu").sum())
        assert abs(dropped - num * probability) < 5 * (num * probability * (1 - probability)) ** 0.5


def test_rows_columns_and_seeds_are_independent() -> None:
    p, num = 0.3, 1 << 20
    masks = [~keep_mask_reference((1024, 1024), CounterDropout(seed, p), device="cpu") for seed in (5, 6, 5 + 2**20)]
    first = masks[0]
    others = [*masks[1:], *(first.roll(shift, axis) for shift in (1, 2, 16) for axis in (0, 1))]
    for other in others:
        both = int((first & other).sum())
        assert abs(both - num * p**2) < 5 * (num * p**2 * (1 - p**2)) ** 0.5
    # Of 1024 rows and columns, none far from what a binomial gives.
    for axis in (0, 1):
        assert (first.sum(axis) - 1024 * p).abs().max() < 5.5 * (1024 * p * (1 - p)) ** 0.5


def test_draw_follows_the_seed_of_torch() -> None:
    seeds = DropoutSeeds()
    torch.manual_seed(3)
    first, second = seeds.draw(0.1), seeds.draw(0.1)
    torch.manual_seed(3)
    assert seeds.draw(0.1) == first != second
    assert seeds.draw(0.0) is None


def test_seeds_with_a_base_count_from_its_start_and_flip_with_it() -> None:
    seeds, base = DropoutSeeds(), torch.tensor([12345], dtype=torch.int32)
    seeds.start(base)
    first, second = seeds.draw(0.1), seeds.draw(0.1)
    seeds.start(base)
    again = seeds.draw(0.1)
    assert first is not None
    assert second is not None
    assert again is not None
    assert again.seed == first.seed != second.seed
    mask = keep_mask_reference((40, 50), first, device="cpu")
    assert mask.equal(keep_mask_reference((40, 50), CounterDropout(first.seed ^ 12345, 0.1), device="cpu"))
    base.fill_(54321)
    assert not mask.equal(keep_mask_reference((40, 50), first, device="cpu"))
    seeds.start(None)
    drawn = seeds.draw(0.1)
    assert drawn is not None
    assert drawn.base is None


@DTYPE
def test_drop_copy(dtype: torch.dtype) -> None:
    for shape in ((1, 1), (5, 64), (7, 33)):
        check_drop_copy(shape, dtype, Place())


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("spare", [0, 5, 8, 16, 4096])
def test_counter_dropout_kernels_on_a_gpu(spare: int, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (5, 64), (33, 576), (17, 4096), (3, 11008)):
        check_drop_copy(shape, dtype, Place("triton", "cuda", spare=spare))


@pytest.mark.gpu
@SEED
@PROBABILITY
def test_the_kernels_mask_on_a_gpu_is_the_references(seed: int, probability: float) -> None:
    x = torch.ones(3000, 1537, device="cuda")
    for base in (None, torch.tensor([987654321], dtype=torch.int32, device="cuda")):
        dropout = CounterDropout(seed, probability, base)
        expected = keep_mask_reference(x.shape, dropout, device="cuda")
        assert drop_copy(x, dropout, out=torch.empty_like(x), backend="triton").equal(expected.float())


@pytest.mark.gpu
def test_places_beyond_32_bits_begin_again() -> None:
    x = torch.ones(2**20 + 3, 4096, dtype=torch.float16, device="cuda")
    drop_copy(x, DROPOUT, out=x, backend="triton")
    assert x[-3:].equal(x[:3])
    assert x[:2000].equal(keep_mask_reference((2000, 4096), DROPOUT, device="cuda").half())


def check_drop_copy(shape: tuple[int, int], dtype: torch.dtype, place: Place) -> None:
    x = torch.randn(shape).to(dtype)
    expected = (x.double() * expected_keep(shape, DROPOUT)).to(x).to(place.device)
    x_buffer, out = place.put(x), place.like(x)
    assert drop_copy(x_buffer, DROPOUT, out=out, backend=place.backend).equal(expected)
    assert drop_copy(x_buffer, DROPOUT, out=x_buffer, backend=place.backend).equal(expected)
    assert_untouched_beside(out)
    assert_untouched_beside(x_buffer)
