"""Dropout whose mask is a function of a seed and an element's place, so that nothing of it is kept.

    dropped(i) = hash(seed ^ base, i) < round(p 2^32)        i = place in the row-major flattened tensor, modulo 2^32

    h = (i * 0x9E3779B1 + (seed ^ base)) mod 2^32
    h ^= h >> 16;  h *= 0x21F0AAAD;  h ^= h >> 15;  h *= 0x735A2D97;  h ^= h >> 15        (all mod 2^32)

A kernel that reads an element anyway asks the hash on the way, forward and again backward. The seed is known to the
host; the base, if there is one, lies on the device, where a graph of kernels finds another one at each launch. The
finaliser is one of those found by search to have the least bias (https://nullprogram.com/blog/2018/07/31/ and its
prospector project).

Nothing is scaled by 1 / (1 - p); the caller has a scaling to fold that into.
"""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.kernels import counter_dropout as kernels
from halfbyte.ops.backend import resolve_backend

MASK_31, MASK_32 = 0x7FFFFFFF, 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, slots=True)
class CounterDropout:
    """Which elements of a tensor are dropped."""

    seed: int
    """In [0, 2^31)."""
    probability: float
    """Inside (0, 1)."""
    base: torch.Tensor | None = None
    """int32, one element in [0, 2^31) on the device; 0 if None."""

    @property
    def threshold(self) -> int:
        """Hashes below it are dropped."""
        return min(round(self.probability * 2**32), MASK_32)


@dataclasses.dataclass(slots=True)
class DropoutSeeds:
    """Where the blocks of a model take their seeds from."""

    base: torch.Tensor | None = None
    """If given, the n-th dropout since `start` has a seed that depends on n alone, and this base."""
    count: int = 0

    def start(self, base: torch.Tensor | None) -> None:
        """Count from the beginning."""
        self.base, self.count = base, 0

    def draw(self, probability: float) -> CounterDropout | None:
        """Return the next dropout, None for p = 0.

        Without a base its seed comes from torch's default generator on the CPU, which waits for no device.
        """
        if not probability:
            return None
        if self.base is None:
            return CounterDropout(int(torch.randint(2**31, (), device="cpu")), probability)
        self.count += 1
        return CounterDropout(self.count * 0x9E3779B1 & MASK_31, probability, self.base)


def keep_mask_reference(
    shape: torch.Size | tuple[int, ...], dropout: CounterDropout, *, device: torch.device | str
) -> torch.Tensor:
    """Return a bool tensor, True where an element is kept: the definition, in plain torch on any device."""
    h = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device=device)
    seed = dropout.seed if dropout.base is None else dropout.base.to(device, torch.int64) ^ dropout.seed
    h = (h * 0x9E3779B1 + seed) & MASK_32
    h = _multiply(h ^ h >> 16, 0x21F0AAAD)
    h = _multiply(h ^ h >> 15, 0x735A2D97)
    return ((h ^ h >> 15) >= dropout.threshold).view(shape)


def drop_copy(x: torch.Tensor, dropout: CounterDropout, *, out: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Write `x` with the dropped elements set to zero to `out`, and return it.

    Args:
        x: (tokens, features), fp32, fp16 or bf16; rows of any stride.
        dropout: Which elements are dropped.
        out: Of the shape of x, rows of any stride; may be x.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("drop_copy", backend, x.device) == "torch":
        return torch.mul(x, keep_mask_reference(x.shape, dropout, device=x.device), out=out)
    assert_kernel_takes(x, out)
    kernels.drop_copy(x, out, dropout)
    return out


def assert_kernel_takes(*tensors: torch.Tensor | None) -> None:
    """Fail unless tensors are what kernels of one pass take: of one shape, features adjacent, at most 32 bits wide."""
    given = [t for t in tensors if t is not None]
    assert all(t.shape == given[0].shape for t in given), [tuple(t.shape) for t in given]
    assert all(t.stride(-1) == 1 and t.itemsize <= 4 for t in given), [(t.stride(), t.dtype) for t in given]


def _multiply(h: torch.Tensor, factor: int) -> torch.Tensor:
    # 32 by 32 bits do not fit a signed 64-bit product: the upper half of the factor's bits first.
    return (((h * (factor >> 16) & 0xFFFF) << 16) + h * (factor & 0xFFFF)) & MASK_32
