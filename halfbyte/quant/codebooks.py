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

Tables are constants: made once for each device, never written to.

Sources: QLoRA, arXiv 2305.14314 (NF4); 8-bit optimizers, arXiv 2110.02861 (dynamic map).
"""

from __future__ import annotations

import dataclasses
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

_CPU = torch.device("cpu")


@functools.cache
def codebook_values(name: str, device: torch.device = _CPU) -> torch.Tensor:
    """Return the value of each code.

    Args:
        name: "nf4" or "fp4".
        device: Where to put it.

    Returns:
        fp32 [16], indexed by code.
    """
    if name == "nf4":
        return _constant(_NF4_VALUES, device)
    magnitudes = _constant(_FP4_TWELFTHS) / 12
    return _constant(torch.cat([magnitudes, 0.0 - magnitudes]), device)


@functools.cache
def code_pairs(name: str, device: torch.device = _CPU) -> torch.Tensor:
    """Return the two values that each packed byte holds, fp32 [256, 2], the high nibble's first."""
    values = codebook_values(name)
    codes = torch.arange(256, device=_CPU)
    return _constant(torch.stack([values[codes >> 4], values[codes & 15]], dim=1), device)


@functools.cache
def sorted_codes(name: str, device: torch.device = _CPU) -> torch.Tensor:
    """Return the codes in ascending order of their values, int32 [16]."""
    return _constant(tuple(range(16)) if name == "nf4" else _FP4_SORTED_CODES, device, dtype=torch.int32)


@functools.cache
def thresholds(name: str, device: torch.device = _CPU) -> torch.Tensor:
    """Return the 15 ascending decision thresholds, fp32.

    A number strictly above `thresholds[i]` lies at sorted place i + 1 or higher.
    """
    if name == "nf4":
        return _constant(_NF4_THRESHOLDS, device)
    ascending = codebook_values(name)[sorted_codes(name)]
    return _constant((ascending[:-1] + ascending[1:]) / 2, device)


@dataclasses.dataclass(frozen=True, slots=True)
class SearchTable:
    """Finds a number's sorted place with one lookup and one comparison, instead of fifteen comparisons.

        b = round(x * scale) + scale;  place = base[b] + (x > threshold[b])

    Bins are so narrow that each holds at most one threshold. The rounding of b is monotone in x, so a threshold of a
    lower bin is below x and one of a higher bin is not: the result is exact whatever happens at the edges of bins.
    """

    base: torch.Tensor
    """fp32 [2 * scale + 1], the number of thresholds in lower bins."""
    threshold: torch.Tensor
    """fp32 [2 * scale + 1], the bin's own threshold, or infinity."""
    scale: int


@functools.cache
def search_table(name: str, scale: int, device: torch.device = _CPU) -> SearchTable:
    """Return the search table of a codebook with bins of width 1 / scale."""
    scaled = thresholds(name).double() * scale
    bins = (scaled.round() + scale).long()
    # Far enough from the edges that every way to round puts a threshold into the same bin.
    assert ((scaled - scaled.round()).abs() < 0.499).all()
    assert bins.unique().numel() == bins.numel()
    base = torch.bucketize(torch.arange(2 * scale + 1, device=_CPU), bins)
    threshold = torch.full((2 * scale + 1,), torch.inf, dtype=torch.float32, device=_CPU)
    threshold[bins] = thresholds(name)
    return SearchTable(base=_constant(base, device), threshold=_constant(threshold, device), scale=scale)


@functools.cache
def dynamic_map(signed: bool, device: torch.device = _CPU) -> torch.Tensor:
    """Return the dynamic map, fp32 [256] ascending; unsigned where the state is never negative.

    For exponent e in 0..6 the magnitudes are 10**(e - 6) times the midpoints of 2**e (signed) or 2**(e + 1) equal
    steps of [0.1, 1]; zero and one complete the 256.
    """
    values = [0.0, 1.0]
    for exponent in range(_DYNAMIC_EXPONENTS):
        num_steps = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, num_steps + 1, dtype=torch.float32, device=_CPU)
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = 10 ** (exponent - _DYNAMIC_EXPONENTS + 1) * midpoints
        values += magnitudes.tolist()
        if signed:
            values += (-magnitudes).tolist()
    return _constant(tuple(sorted(values)), device)


@functools.cache
def dynamic_codes(device: torch.device = _CPU) -> torch.Tensor:
    """Return the signed dynamic map's code for each of 65536 equally spaced numbers from -1 to 1, uint8.

    bitsandbytes' CPU path quantises to 8 bits through this table, which is coarser than the map near zero; its CUDA
    path searches the map itself. Equal bytes on every device need one of the two, and this is the one that a test
    without a GPU can hold against bitsandbytes.
    """
    values = dynamic_map(True)
    grid = torch.arange(65536, dtype=torch.float32, device=_CPU) * 2.0 / 65535.0 - 1.0
    return _constant(torch.bucketize(grid, (values[:-1] + values[1:]) * 0.5), device, dtype=torch.uint8)


def _constant(
    values: tuple[float, ...] | torch.Tensor, device: torch.device = _CPU, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    # Not an inference tensor, even when the first caller is in inference mode: it outlives that.
    with torch.inference_mode(False):
        return torch.as_tensor(values, dtype=dtype, device=_CPU).clone().to(device)
