"""The dropped elements are an exact Bernoulli process, and dropping and its gradient do what they say."""

from __future__ import annotations

import math

import pytest
import torch

from halfbyte.ops.dropout import apply_dropout, draw_dropout, drop_

STANDARD_DEVIATIONS = 5
"""A right generator fails a test of this width once in two million runs; the seed is fixed besides."""


def kept(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Draw a dropout of `x`; return it as a bool tensor, True where kept."""
    dropped = draw_dropout(x, probability=probability)
    return apply_dropout(torch.ones_like(x), dropped, out=torch.empty_like(x)).bool()


def assert_rate(rate: float, expected: float, num_draws: int) -> None:
    deviation = math.sqrt(expected * (1 - expected) / num_draws)
    assert abs(rate - expected) <= STANDARD_DEVIATIONS * deviation, f"{rate} is not {expected} +- {deviation}"


@pytest.mark.parametrize("probability", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_draw_dropout_has_the_rate(probability: float) -> None:
    keep = kept(torch.empty(1000, 1000), probability)
    assert_rate(1 - keep.double().mean().item(), probability, keep.numel())


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_draw_dropout_is_independent_between_neighbours(probability: float) -> None:
    drop = ~kept(torch.empty(1000, 1000), probability)
    for distance in (1, 2, 64, 1000):
        flat = drop.view(-1)
        both = flat[distance:] & flat[:-distance]
        assert_rate(both.double().mean().item(), probability**2, both.numel())


def test_draw_dropout_is_independent_between_draws() -> None:
    x = torch.empty(1000, 1000)
    first, second = ~kept(x, 0.05), ~kept(x, 0.05)
    assert_rate((first & second).double().mean().item(), 0.05**2, x.numel())


def test_draw_dropout_treats_every_element_alike() -> None:
    num_draws = 4000
    drops = torch.stack([~kept(torch.empty(7), 0.3) for _ in range(num_draws)]).double()
    for rate in drops.mean(0).tolist():
        assert_rate(rate, 0.3, num_draws)
    pairs = (drops.T @ drops) / num_draws
    for i in range(7):
        for j in range(i):
            assert_rate(pairs[i, j].item(), 0.09, num_draws)


@pytest.mark.parametrize("num_elements", [0, 1, 2, 63, 1000])
def test_draw_dropout_stays_inside(num_elements: int) -> None:
    for _ in range(50):
        positions = draw_dropout(torch.empty(num_elements), probability=0.5)
        assert positions.dtype == torch.int32
        assert (positions >= 0).all()
        assert (positions < num_elements).all()
        assert (positions.diff() > 0).all()


def test_draw_dropout_draws_again_when_gaps_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.ops import dropout

    draw = dropout._draw_positions
    monkeypatch.setattr(dropout, "_draw_positions", lambda num_gaps, p, start: draw(num_gaps // 7, p, start=start))
    positions = draw_dropout(torch.empty(100_000), probability=0.05)
    assert (positions.diff() > 0).all()
    assert_rate(positions.numel() / 100_000, 0.05, 100_000)


def test_draw_dropout_is_decided_by_the_seed() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(draw_dropout(torch.empty(63, 64), probability=0.05))
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_dropout_zeroes_the_dropped_only(dtype: torch.dtype) -> None:
    x = torch.randn(63, 40, dtype=dtype)
    positions = draw_dropout(x, probability=0.2)
    keep = torch.ones(x.numel(), dtype=torch.bool)
    keep[positions.long()] = False
    out = apply_dropout(x, positions, out=torch.full_like(x, torch.nan))
    assert out.equal(torch.where(keep.view_as(x), x, 0))


@pytest.mark.parametrize("as_mask", [False, True])
def test_drop_zeroes_in_place(as_mask: bool) -> None:
    x = torch.randn(63, 40)
    positions = draw_dropout(x, probability=0.2)
    keep = torch.ones(x.numel(), dtype=torch.bool)
    keep[positions.long()] = False
    expected = torch.where(keep.view_as(x), x, 0)
    assert drop_(x, keep.view_as(x) if as_mask else positions) is x
    assert x.equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_draw_dropout_on_a_gpu_has_the_rate(probability: float) -> None:
    torch.cuda.manual_seed(0)
    x = torch.ones(1000, 1000, device="cuda", dtype=torch.bfloat16)
    keep = draw_dropout(x, probability=probability)
    out = apply_dropout(x, keep, out=torch.empty_like(x))
    assert_rate(1 - out.double().mean().item(), probability, x.numel())
    torch.cuda.manual_seed(0)
    assert draw_dropout(x, probability=probability).equal(keep)
