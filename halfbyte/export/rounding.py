"""Rounding that does not lose an update smaller than half a step.

A 16-bit base weight lies on the grid of its dtype. An update of less than half a step rounds back to it: not noise, but
the update itself is lost, for every weight that is large enough. We round up or down at random, with probabilities that
make the expected value exact:

    step = distance of neighbours at x         round(x) = step * floor(x / step + u),  u uniform in [0, 1)

so that what is left is noise of less than a step, independent of the update, as any rounding leaves it. The random
numbers come from a generator seeded by the tensor's name: the same inputs give the same file.

Source: stochastic rounding, e.g. Croci et al., arXiv 2103.12034.
"""

from __future__ import annotations

import hashlib

import torch

# Explicit mantissa bits, and the exponent below which steps shrink no further; bfloat16's own, -126, would take the
# arithmetic below out of fp32's range, for numbers that no weight has.
_FORMATS = {torch.bfloat16: (7, -100), torch.float16: (10, -14)}
# Few enough that a number on the grid plus noise is exact in fp32, and so stays where it is.
NOISE_LEVELS = 1 << 12


def round_fairly(x: torch.Tensor, dtype: torch.dtype, *, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 values to `dtype`, in expectation exactly; float32 is returned as it is."""
    if dtype == torch.float32:
        return x
    mantissa_bits, smallest_exponent = _FORMATS[dtype]
    # frexp gives x = m * 2**e with m in [0.5, 1).
    exponent = torch.frexp(x).exponent.clamp_(min=smallest_exponent + 1).sub_(mantissa_bits + 1)
    noise = torch.randint(0, NOISE_LEVELS, x.shape, generator=generator, dtype=torch.int32) / NOISE_LEVELS
    steps = torch.ldexp(x, -exponent).add_(noise).floor_()
    return torch.ldexp(steps, exponent).to(dtype)


def generator_for(name: str) -> torch.Generator:
    """Return a generator whose numbers depend on `name` alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.Generator().manual_seed(seed)
