"""AdamW whose moments are kept in 8 bits.

For each parameter p with gradient g, at its own step count t:

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    c1 = 1 - beta1^t                       c2 = sqrt(1 - beta2^t)
    p = p (1 - lr weight_decay)
    p = p - (lr / c1) m / (sqrt(v) / c2 + eps)

in fp32 whatever the parameter's dtype, which is rounded to once, at the end. Between steps m and v are codes of one
byte, in blocks of 256 elements of the flattened parameter; a block keeps its largest magnitude in fp32:

    absmax = max |x|      code = nearest(x (1 / absmax))      x' = map[code] absmax

The map has 256 values: the signed dynamic map for m, the unsigned one for v. A number halfway between two values takes
the lower code. A block of zeros has absmax 0 and the code of zero. Parameters of fewer than 4096 elements keep m and
v in fp32 and divide as m / (sqrt(v) + eps c2), which is the same number rounded elsewhere.

**Layout.** The moments of all parameters live in one slab of K blocks each, [K, 256] codes and [K] absmax; a parameter
starts at a block boundary and its last block is padded with the code of zero. One slab is what lets one launch, or
one pass over cache-sized chunks, update everything; a tensor for each parameter costs 43 ms a step for 448 adapters.

**Search.** The top 16 bits of an fp32 number (sign, exponent, 7 bits of fraction) name a cell so small that at most
one decision threshold lies in it. So `code = base[cell] + (x > threshold[cell])`: two table reads and one compare,
exact, against eight dependent steps of a binary search (on a CPU 1.7 ns an element against 55 ns for bucketize).

**Against bitsandbytes 0.50.2.** Its CPU path computes this formula, in this order. Its quantiser there first rounds
x / absmax to one of 65536 evenly spaced numbers, so that magnitudes below 1.5e-5 of a block's largest are lost (an
exact zero comes back as 1.4e-5 absmax); its CUDA kernel, and we on every device, take the nearest value.
Its CUDA kernel also moves a code whose sign differs from m's to the next one, which only turns tiny negative m from 0
into -5.5e-7 absmax, and decays the weight after the update; we do as its CPU path, and torch, do.

Price: 2.03 bytes a parameter for both moments instead of 8, against errors of up to 0.7% of absmax in m, 0.35% in v.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; Loshchilov and Hutter, Decoupled
Weight Decay Regularization, arXiv 1711.05101.
"""

# K blocks of one slab

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from halfbyte.errors import BackendError, ConfigError
from halfbyte.memory.paged_state import PagedState
from halfbyte.quant.codebooks import dynamic_map

BLOCK_SIZE = 256
MIN_8BIT_NUMEL = 4096
NUM_CELLS = 1 << 16
# The smallest divisor of a block, the smallest normal fp32 number, so that its reciprocal is finite.
MIN_ABSMAX = 2.0**-126


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdamWOptions:
    """The numbers of one parameter group at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def corrections(self, step: int) -> tuple[float, float]:
        """Return c1 and c2 for the step numbered from 1."""
        return 1.0 - self.beta1**step, math.sqrt(1.0 - self.beta2**step)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepControl:
    """What a step does to all gradients alike; tensors of one element, so that a device need not be waited for."""

    grad_scale: torch.Tensor | None = None
    """Gradients are divided by it."""
    found_inf: torch.Tensor | None = None
    """Where it is not zero the step does nothing and does not count."""


class Stepper(Protocol):
    """One backend's way to update the tensors of one `AdamWState`."""

    def step_(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        *,
        groups: Sequence[AdamWOptions],
        control: StepControl,
    ) -> None:
        """Update `params` and the state; a tensor whose gradient is None keeps its value, moments and step count."""

    def read_steps(self) -> list[int]:
        """Return how many steps each tensor has taken; waits for the device."""

    def write_steps(self, steps: Sequence[int]) -> None:
        """Set how many steps each tensor has taken."""


class AdamWState:
    """The moments of many tensors in one slab.

    Args:
        numels: Elements of each tensor.
        group_of: Index of each tensor's parameter group.
        state_bits: 8 (codes) or 32 (fp32) for each moment.
        device: Of the tensors.
        paged: Where the slab lives if not on `device`.
    """

    def __init__(
        self,
        numels: Sequence[int],
        group_of: Sequence[int],
        *,
        state_bits: Literal[8, 32],
        device: torch.device,
        paged: PagedState | None = None,
    ) -> None:
        self.numels = tuple(numels)
        self.group_of = tuple(group_of)
        self.state_bits = state_bits
        self.device = device
        self.paged = paged
        self.first_block = [0]
        for numel in self.numels:
            self.first_block.append(self.first_block[-1] + math.ceil(numel / BLOCK_SIZE))
        num_blocks = self.first_block[-1]

        def fill(*shape: int, value: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            if paged is not None:
                return paged.full(*shape, value=value, dtype=dtype)
            return torch.full(shape, value, dtype=dtype, device=device)

        dtype = torch.uint8 if state_bits == 8 else torch.float32
        zero_of_m = code_of_zero(signed=True) if state_bits == 8 else 0
        self.m = fill(num_blocks, BLOCK_SIZE, value=zero_of_m, dtype=dtype)
        self.v = fill(num_blocks, BLOCK_SIZE, dtype=dtype)
        self.m_absmax = fill(num_blocks) if state_bits == 8 else None
        self.v_absmax = fill(num_blocks) if state_bits == 8 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole slab."""
        return sum(t.nbytes for t in (self.m, self.v, self.m_absmax, self.v_absmax) if t is not None)

    def views(self, tensor: int) -> dict[str, torch.Tensor]:
        """Return the part of the slab that belongs to one tensor: flat codes and absmax, or flat fp32 moments."""
        first, last, numel = self.first_block[tensor], self.first_block[tensor + 1], self.numels[tensor]
        m, v = self.m[first:last].view(-1)[:numel], self.v[first:last].view(-1)[:numel]
        if self.m_absmax is None or self.v_absmax is None:
            return {"m": m, "v": v}
        m_absmax, v_absmax = self.m_absmax[first:last], self.v_absmax[first:last]
        return {"m_codes": m, "m_absmax": m_absmax, "v_codes": v, "v_absmax": v_absmax}


def build_stepper(state: AdamWState, *, backend: str = "auto") -> Stepper:
    """Choose how the tensors of `state` are updated.

    Args:
        state: Their moments.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown, or cannot run on the state's device.
    """
    from halfbyte.ops import adamw8bit_torch, adamw8bit_triton

    if backend == "auto":
        backend = "triton" if state.device.type == "cuda" else "torch"
    if backend == "torch":
        return adamw8bit_torch.TorchStepper(state)
    if backend == "triton":
        return adamw8bit_triton.TritonStepper(state)
    raise BackendError(f"adamw8bit has no backend {backend!r}; there are auto, torch and triton")


def adamw_step_reference_(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: dict[str, torch.Tensor],
    *,
    options: AdamWOptions,
    step: int,
) -> None:
    """Update one parameter and its moments, in plain torch.

    Args:
        param: Any shape, fp32, bf16 or fp16; changed.
        grad: Same shape and dtype.
        moments: As `AdamWState.views` gives them; changed.
        options: Of its group.
        step: Numbered from 1.
    """
    p, g = param.float(), grad.float()
    c1, c2 = options.corrections(step)
    in_8bit = "m_codes" in moments
    if in_8bit:
        m = dequantize_8bit_reference(moments["m_codes"], moments["m_absmax"], signed=True).view_as(p)
        v = dequantize_8bit_reference(moments["v_codes"], moments["v_absmax"], signed=False).view_as(p)
    else:
        m, v = moments["m"].view_as(p), moments["v"].view_as(p)
    m.mul_(options.beta1).add_(g, alpha=1.0 - options.beta1)
    v.mul_(options.beta2).addcmul_(g, g, value=1.0 - options.beta2)
    if options.weight_decay > 0.0:
        p = p * (1.0 - options.lr * options.weight_decay)
    if in_8bit:
        p = p.addcdiv(m, v.sqrt() / c2 + options.eps, value=-options.lr / c1)
        for name, moment, signed in (("m", m, True), ("v", v, False)):
            codes, absmax = quantize_8bit_reference(moment, signed=signed)
            moments[f"{name}_codes"].copy_(codes.view(-1))
            moments[f"{name}_absmax"].copy_(absmax)
    else:
        p = p.add(m / (v.sqrt() + options.eps * c2), alpha=-options.lr * c2 / c1)
    param.copy_(p)


def quantize_8bit_reference(x: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to 8 bits in blocks of 256, in plain torch.

    Args:
        x: fp32, any shape.
        signed: Whether to use the signed dynamic map.

    Returns:
        Codes, uint8 of x's shape, and absmax, fp32 [K].
    """
    flat = x.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=MIN_ABSMAX))[:, None]
    codes = torch.bucketize(scaled, _thresholds(signed).to(x.device)).to(torch.uint8)
    return codes.view(-1)[: flat.numel()].view(x.shape), absmax


def dequantize_8bit_reference(codes: torch.Tensor, absmax: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Restore fp32 values from 8 bits, in plain torch."""
    values = dynamic_map(signed).to(codes.device)[codes.long()]
    return values * absmax.repeat_interleave(BLOCK_SIZE)[: codes.numel()].view(codes.shape)


@functools.cache
def search_tables(*, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `base`, uint8 [65536], and `threshold`, fp32 [65536], indexed by the top 16 bits of an fp32 number.

    The base is the code of the smallest number in the cell. Shared, on the CPU: do not write to them.
    """
    cells = torch.arange(NUM_CELLS, dtype=torch.int64)
    # A negative number is smallest where the bits below the cell are all ones.
    lowest = (cells << 16) | torch.where(cells >= NUM_CELLS // 2, 0xFFFF, 0)
    smallest = torch.where(lowest >= 1 << 31, lowest - (1 << 32), lowest).to(torch.int32).view(torch.float32)
    thresholds = _thresholds(signed)
    base = torch.bucketize(smallest, thresholds)
    above_last = torch.tensor([math.inf])
    return base.to(torch.uint8), torch.cat([thresholds, above_last])[base]


def code_of_zero(*, signed: bool) -> int:
    """Return the code whose value is 0."""
    return 127 if signed else 0


def check_tensors(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> None:
    """Raise ConfigError where a gradient cannot be used."""
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        if grad.is_sparse:
            raise ConfigError(
                "AdamW with flat state needs dense gradients, one is sparse: build the embedding with sparse=False"
            )
        if grad.dtype != param.dtype or grad.device != param.device:
            raise ConfigError(
                f"a gradient is {grad.dtype} on {grad.device}, its parameter {param.dtype} on {param.device}; they must agree"
            )


def _thresholds(signed: bool) -> torch.Tensor:
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) / 2
