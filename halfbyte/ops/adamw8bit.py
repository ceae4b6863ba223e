"""AdamW whose moments are kept in 8 bits.

For each parameter p with gradient g, at its own step count t:

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    c1 = 1 - beta1^t                       c2 = sqrt(1 - beta2^t)
    p = p (1 - lr weight_decay)
    p = p - (lr / c1) m / (sqrt(v) / c2 + eps)

in fp32 whatever the parameter's dtype, which is rounded to once, at the end. Between steps m and v are codes of one
byte, in blocks of 256 elements of the flattened parameter; a block keeps its largest magnitude in fp32:

    absmax = max |x|      y = x (1 / absmax)      code = nearest(grid(y))      x' = map[code] absmax

The map has 256 values: the signed dynamic map for m, the unsigned one for v. `grid` rounds to the nearest of 65536
evenly spaced numbers from -1 to 1, so that the code is one table lookup:

    code = code_table[trunc(fma(y + 1, 32767.5, 0.5))]

A block of zeros has absmax 0 and codes 0. Parameters of fewer than 4096 elements keep m and v in fp32 and divide as
m / (sqrt(v) + eps c2), which is the same number rounded elsewhere.

**Layout.** The moments of all parameters live in one slab of K blocks each, [K, 256] codes and [K] absmax; a parameter
starts at a block boundary and pads its last block. One slab is what lets one launch, or one pass over cache-sized
chunks, update everything; a launch for each parameter costs 43 ms a step for 448 adapters.

**Why the grid.** All of this is what bitsandbytes 0.50.2 does on a CPU, code for code. By its source its CUDA kernel
differs: it takes the nearest value without the grid, moves an m that the map would turn from negative to zero to the
smallest negative value, and decays the weight after the update. The grid's step, 3e-5, is coarser than the map near
zero (5e-7), and that is a virtue: the nearest value of a v under 1.6e-7 absmax is 0, after which the next step divides
by little more than eps. On gradients whose elements differ by four orders of magnitude, 50 steps with the grid end
5% from AdamW in fp64 and without it 33%. The grid has no zero either: m = 0 comes back as 1.5e-5 absmax, a drift
under 0.4% of lr a step.

Price: 2.03 bytes a parameter for both moments instead of 8, against errors of up to 0.7% of absmax in m, 0.35% in v.

Sources: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; Decoupled Weight Decay Regularization, arXiv
1711.05101.
"""

# K blocks of one slab

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch

from halfbyte.errors import ConfigError
from halfbyte.ops.backend import resolve_backend
from halfbyte.quant.codebooks import dynamic_map

BLOCK_SIZE = 256
MIN_8BIT_NUMEL = 4096
NUM_GRID = 1 << 16
GRID_SCALE = (NUM_GRID - 1) / 2


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
        zeros: Makes the tensors of the slab, called as `zeros(*shape, dtype=dtype)`; on `device` unless given.
    """

    def __init__(
        self,
        numels: Sequence[int],
        group_of: Sequence[int],
        *,
        state_bits: Literal[8, 32],
        device: torch.device,
        zeros: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.numels = tuple(numels)
        self.group_of = tuple(group_of)
        self.state_bits = state_bits
        self.device = device
        self.first_block = [0]
        for numel in self.numels:
            self.first_block.append(self.first_block[-1] + math.ceil(numel / BLOCK_SIZE))
        num_blocks = self.first_block[-1]

        if zeros is None:
            zeros = functools.partial(torch.zeros, device=device)
        dtype = torch.uint8 if state_bits == 8 else torch.float32
        self.m = zeros(num_blocks, BLOCK_SIZE, dtype=dtype)
        self.v = zeros(num_blocks, BLOCK_SIZE, dtype=dtype)
        self.m_absmax = zeros(num_blocks, dtype=torch.float32) if state_bits == 8 else None
        self.v_absmax = zeros(num_blocks, dtype=torch.float32) if state_bits == 8 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole slab."""
        return sum(tensor.nbytes for tensor in self.slab_of(self.tensors).values())

    @property
    def tensors(self) -> range:
        """All of them, by their numbers."""
        return range(len(self.numels))

    def views(self, tensor: int) -> dict[str, torch.Tensor]:
        """Return the part of the slab that belongs to one tensor: flat codes and absmax, or flat fp32 moments."""
        alone = range(tensor, tensor + 1)
        return self.divide(self.slab_of(alone), alone)[0]

    def slab_of(self, tensors: range) -> dict[str, torch.Tensor]:
        """Return the part of the slab that belongs to tensors in a row, by the names of `views`."""
        blocks = slice(self.first_block[tensors.start], self.first_block[tensors.stop])
        m, v = self.m[blocks], self.v[blocks]
        if self.m_absmax is None or self.v_absmax is None:
            return {"m": m, "v": v}
        return {"m_codes": m, "m_absmax": self.m_absmax[blocks], "v_codes": v, "v_absmax": self.v_absmax[blocks]}

    def divide(self, slab: Mapping[str, torch.Tensor], tensors: range) -> list[dict[str, torch.Tensor]]:
        """Return the views of each tensor, of what `slab_of` gives or of a copy of that."""
        num_blocks = [self.first_block[tensor + 1] - self.first_block[tensor] for tensor in tensors]
        used_and_unused = [
            size
            for tensor, blocks in zip(tensors, num_blocks, strict=True)
            for size in (self.numels[tensor], blocks * BLOCK_SIZE - self.numels[tensor])
        ]
        columns = [
            part.split(num_blocks) if part.dim() == 1 else part.view(-1).split(used_and_unused)[::2]
            for part in slab.values()
        ]
        return [dict(zip(slab, row, strict=True)) for row in zip(*columns, strict=True)]

    def in_ranges(self, max_bytes: int) -> Iterator[range]:
        """Yield all tensors in ranges of which m takes up to so many bytes, or of one that takes more."""
        block_bytes = BLOCK_SIZE * self.m.itemsize
        start = 0
        for tensor in self.tensors[1:]:
            if (self.first_block[tensor + 1] - self.first_block[start]) * block_bytes > max_bytes:
                yield range(start, tensor)
                start = tensor
        yield range(start, len(self.numels))


def build_stepper(state: AdamWState, *, backend: str = "auto") -> Stepper:
    """Choose how the tensors of `state` are updated.

    Args:
        state: Their moments.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown, or cannot run on the state's device.
    """
    from halfbyte.ops.adamw8bit_torch import TorchStepper
    from halfbyte.ops.adamw8bit_triton import TritonStepper

    steppers: dict[str, Callable[[AdamWState], Stepper]] = {"torch": TorchStepper, "triton": TritonStepper}
    return steppers[resolve_backend("adamw8bit", backend, state.device)](state)


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
    # Not a number, as 0 / 0 and inf / inf are, takes code 0.
    scaled = (blocks * absmax.reciprocal()[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)
    # In fp64 the product is exact, so that rounding to fp32 makes this one fused multiply-add.
    index = ((scaled + 1).double() * GRID_SCALE + 0.5).float().int()
    codes = code_table(signed=signed).to(x.device)[index]
    return codes.view(-1)[: flat.numel()].view(x.shape), absmax


def dequantize_8bit_reference(codes: torch.Tensor, absmax: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Restore fp32 values from 8 bits, in plain torch."""
    values = dynamic_map(signed).to(codes.device)[codes.long()]
    return values * absmax.repeat_interleave(BLOCK_SIZE)[: codes.numel()].view(codes.shape)


@functools.cache
def code_table(*, signed: bool) -> torch.Tensor:
    """Return the code of each of the grid's numbers, uint8 [65536] on the CPU; shared, do not write to it."""
    values = dynamic_map(signed)
    grid = torch.arange(NUM_GRID, dtype=torch.float32) / GRID_SCALE - 1.0
    return torch.bucketize(grid, (values[:-1] + values[1:]) / 2).to(torch.uint8)


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
                f"a gradient is {grad.dtype} on {grad.device}, its parameter {param.dtype} on {param.device}; "
                "they must agree"
            )
