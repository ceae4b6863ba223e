"""The numbers that codes stand for.

**NF4** holds 16 quantiles of a normal distribution, scaled to [-1, 1], with an exact zero. **FP4** holds a sign bit and
seven magnitudes spaced like a tiny floating-point format; its codes are bit patterns, so they are not sorted.
**The dynamic map** holds 256 sorted values whose spacing shrinks towards zero: a decimal exponent of up to 7 steps
and a linear fraction in what bits are left. Double quantisation uses its signed form for absmax.

Quantising is a search among 15 sorted thresholds: x takes the sorted place `count(x > threshold)`, a tie going to the
lower place, and `sorted_codes` says which code lives there. NF4's thresholds are the constants compiled into
bitsandbytes' CUDA kernels; its CPU path uses the fp32 midpoints of the codebook, and four of the fifteen differ from
these by one unit in the last place. FP4's thresholds are the fp32 midpoints. FP4 has two codes for zero, 0 and 8; as
in bitsandbytes on the CPU, numbers in (0, threshold] take 8 and those in (-threshold, 0] take 0.

Sources: QLoRA, arXiv 2305.14314 (NF4); 8-bit optimizers, arXiv 2110.02861 (dynamic map).
"""

from __future__ import annotations

import functools

import torch

_NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_NF4_THRESHOLDS = (
    -0.8480964303016663,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552542090416,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016633868217468,
    0.6427869200706482,
    0.8614783883094788,
)

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4_SORTED_CODES = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

_DYNAMIC_EXPONENTS = 7


@functools.cache
def codebook_values(name: str) -> torch.Tensor:
    """Return the value of each code.

    Args:
        name: "nf4" or "fp4".

    Returns:
        fp32 [16] on the CPU, indexed by code. Shared: do not write to it.
    """
    if name == "nf4":
        return torch.tensor(_NF4_VALUES, dtype=torch.float32)
    magnitudes = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32) / 12
    return torch.cat([magnitudes, 0.0 - magnitudes])


@functools.cache
def sorted_codes(name: str) -> torch.Tensor:
    """Return the codes in ascending order of their values, uint8 [16] on the CPU."""
    return torch.tensor(range(16) if name == "nf4" else _FP4_SORTED_CODES, dtype=torch.uint8)


@functools.cache
def thresholds(name: str) -> torch.Tensor:
    """Return the 15 ascending decision thresholds, fp32 on the CPU.

    A number strictly above `thresholds[i]` lies at sorted place i + 1 or higher.
    """
    if name == "nf4":
        return torch.tensor(_NF4_THRESHOLDS, dtype=torch.float32)
    ascending = codebook_values(name)[sorted_codes(name).long()]
    return (ascending[:-1] + ascending[1:]) / 2


@functools.cache
def dynamic_map(signed: bool) -> torch.Tensor:
    """Return the dynamic map, fp32 [256] ascending on the CPU; unsigned when the state is never negative.

    For exponent e in 0..6 the magnitudes are 10**(e - 6) times the midpoints of 2**e (signed) or 2**(e + 1) equal
    steps of [0.1, 1]; zero and one complete the 256.
    """
    values = [0.0, 1.0]
    for exponent in range(_DYNAMIC_EXPONENTS):
        num_steps = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, num_steps + 1, dtype=torch.float32)
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = 10 ** (exponent - _DYNAMIC_EXPONENTS + 1) * midpoints
        values += magnitudes.tolist()
        if signed:
            values += (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
