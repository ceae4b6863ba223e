from __future__ import annotations

import pytest
import torch

from halfbyte.export.rounding import generator_for, round_fairly

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_fairly_leaves_numbers_on_the_grid(dtype: torch.dtype) -> None:
    grid = (torch.randn(100_000) * torch.logspace(-4, 3, 100_000)).to(dtype).float()
    grid[:4] = torch.tensor([0.0, -1.0, 1.0, 0.5])
    assert torch.equal(round_fairly(grid, dtype, generator=generator_for("x")).float(), grid)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_fairly_goes_to_a_neighbour(dtype: torch.dtype) -> None:
    x = torch.randn(100_000) * torch.logspace(-4, 3, 100_000)
    rounded = round_fairly(x, dtype, generator=generator_for("x"))
    nearest = x.to(dtype)
    infinity = torch.full_like(nearest, float("inf"))
    other = torch.where(nearest.float() > x, torch.nextafter(nearest, -infinity), torch.nextafter(nearest, infinity))
    assert bool(((rounded == nearest) | (rounded == other)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.7, -0.7, 3e-3, 1 + 1e-3, -2.0 - 1e-3])
def test_round_fairly_is_exact_on_average(dtype: torch.dtype, value: float) -> None:
    x = torch.full((200_000,), value)
    mean = round_fairly(x, dtype, generator=generator_for("x")).double().mean().item()
    exact = x[0].double().item()
    step = abs(exact) * torch.finfo(dtype).eps
    # Four standard errors of a coin flip between two neighbours, and the noise's own resolution.
    assert abs(mean - exact) <= step * (4 * 0.5 / 200_000**0.5 + 2**-12)


def test_round_fairly_leaves_fp32_alone() -> None:
    x = torch.randn(10)
    assert round_fairly(x, torch.float32, generator=generator_for("x")) is x


def test_generator_for_depends_on_the_name_alone() -> None:
    once, again, other = (torch.rand(4, generator=generator_for(name)) for name in ("a", "a", "b"))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
