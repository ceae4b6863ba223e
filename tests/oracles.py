"""The one table of tolerances, and brute-force oracles.

A result computed in a dtype of unit roundoff u carries a relative error of about u for each rounding on its way. A
sum of n products rounded to that dtype only once, at the end, keeps an error near u whatever n is, because hardware
accumulates in fp32; each further rounding of an intermediate adds u in quadrature. We therefore compare relative
root-mean-square errors against `roundings * u`, with `roundings` counted from the formula, plus the fp32 summation
error sqrt(n) * 2**-24.
"""

from __future__ import annotations

import math

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def relative_rms(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference, in fp64."""
    ref, act = reference.detach().double().cpu(), actual.detach().double().cpu()
    scale = ref.square().mean().sqrt().item()
    error = (ref - act).square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def tolerance(dtype: torch.dtype, *, roundings: float = 2, reduction_length: int = 1) -> float:
    """Largest relative RMS error that `roundings` roundings to `dtype` and an fp32 sum of this length explain."""
    return roundings * UNIT_ROUNDOFF[dtype] + 4 * math.sqrt(reduction_length) * UNIT_ROUNDOFF[torch.float32]


def assert_close(
    name: str,
    reference: torch.Tensor,
    actual: torch.Tensor,
    *,
    dtype: torch.dtype,
    roundings: float = 2,
    reduction_length: int = 1,
) -> None:
    """Fail with the figures when `actual` is further from `reference` than its dtype explains.

    Args:
        name: What is compared, for the message.
        reference: The right values, in a higher precision.
        actual: The values under test, same shape.
        dtype: The coarsest dtype that `actual` was rounded to on its way.
        roundings: How many roundings to `dtype` its formula has.
        reduction_length: The longest fp32 sum in its formula.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = relative_rms(reference, actual)
    limit = tolerance(dtype, roundings=roundings, reduction_length=reduction_length)
    assert error <= limit, f"{name}: relative RMS error {error:.3e} over {limit:.3e} ({dtype}, {roundings} roundings)"
