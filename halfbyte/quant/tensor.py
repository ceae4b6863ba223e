"""What a 4-bit weight is: a frozen record of plain tensors.

A weight of any shape is flattened row by row and cut into blocks of `block_size` elements (the last block may be
short). Each element becomes a 4-bit code, an index into a codebook of 16 values in [-1, 1]; each block keeps its
largest magnitude, `absmax`. The element is restored as

    w = codebook[code] * absmax[block]

Two codes share a byte: the even element in the high nibble, the odd one in the low nibble.

Double quantisation stores absmax in 8 bits as well: its mean is subtracted (`absmax_offset`), and what is left is
quantised in groups of 256 against the signed dynamic map, one fp32 `absmax_scale` a group:

    absmax = dynamic_map[absmax_code] * absmax_scale[block // 256] + absmax_offset

No tensor subclass: a subclass needs a handler for each operator it might meet, a record needs none.

Source: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from halfbyte.errors import ConfigError

CODEBOOKS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ABSMAX_GROUP = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """How a weight is quantised."""

    codebook: Literal["nf4", "fp4"] = "nf4"
    """The 16 values that a code stands for."""
    block_size: int = 64
    """Elements that share one absmax."""
    double_quant: bool = True
    """Whether absmax itself is kept in 8 bits."""

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise ConfigError(f"quant.codebook is {self.codebook!r}; allowed: {', '.join(CODEBOOKS)}")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"quant.block_size is {self.block_size}; allowed: {', '.join(map(str, BLOCK_SIZES))}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedTensor:
    """A weight in 4 bits."""

    packed: torch.Tensor
    """uint8 [(numel + 1) // 2], two codes a byte."""
    absmax: torch.Tensor
    """fp32 [num_blocks], or uint8 [num_blocks] with double quantisation."""
    absmax_scale: torch.Tensor | None = None
    """fp32 [ceil(num_blocks / 256)] with double quantisation."""
    absmax_offset: torch.Tensor | None = None
    """fp32 scalar with double quantisation."""
    codebook: Literal["nf4", "fp4"] = "nf4"
    block_size: int = 64
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The dtype the weight had, and that dequantising gives unless told otherwise."""

    @property
    def double_quant(self) -> bool:
        return self.absmax_scale is not None

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(codebook=self.codebook, block_size=self.block_size, double_quant=self.double_quant)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors that hold this weight."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold this weight, those that are None left out."""
        parts = (self.packed, self.absmax, self.absmax_scale, self.absmax_offset)
        return tuple(t for t in parts if t is not None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> QuantizedTensor:
        """Return this weight with all its tensors on `device`."""

        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        return dataclasses.replace(
            self,
            packed=self.packed.to(device, non_blocking=non_blocking),
            absmax=self.absmax.to(device, non_blocking=non_blocking),
            absmax_scale=move(self.absmax_scale),
            absmax_offset=move(self.absmax_offset),
        )
