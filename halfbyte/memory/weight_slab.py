"""The 4-bit weights of one decoder block in one stretch of bytes, so that one copy moves them all.

    | q codes | q absmax | q scales | k codes | ...       each part starts at a multiple of 256 bytes

A slab's home is pinned host memory or, where that has no room for it, a file without a name, see `host_memory`. Slabs
in files are read ahead, see `read_ahead`.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Mapping

import torch

from halfbyte.quant.tensor import QuantizedTensor

ALIGNMENT_BYTES = 256
PART_NAMES = ("packed", "absmax", "absmax_scale", "absmax_offset")


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """Where one tensor of one weight lies."""

    weight: str
    name: str
    first_byte: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Return this tensor in a stretch of bytes that is laid out like the slab."""
        return memory[self.first_byte : self.first_byte + self.nbytes].view(self.dtype).view(self.shape)


class WeightSlab:
    """Weights that lie side by side, and where.

    Args:
        weights: By name. They stay as they are; their copies are `weights` of the slab.
        memory: uint8, at least `slab_bytes(weights)`; what is written to.
        file: Descriptor of the file whose mapping the memory is, if it is one; the slab closes it.
        is_filled: Whether the memory holds the weights already, or another process is writing them.
    """

    def __init__(
        self,
        weights: Mapping[str, QuantizedTensor],
        memory: torch.Tensor,
        *,
        file: int | None = None,
        is_filled: bool = False,
    ) -> None:
        self._parts = _lay_out(weights)
        self._likes = dict(weights)
        self.nbytes = _end_of(self._parts)
        self.memory, self.file = memory[: self.nbytes], file
        if file is not None:
            weakref.finalize(self, os.close, file)
        for part in () if is_filled else self._parts:
            part.view(self.memory).copy_(getattr(weights[part.weight], part.name))
        self.weights = self._likes = self.over(self.memory)

    @property
    def is_on_disk(self) -> bool:
        """Whether its home is a file, which a device cannot be fed from."""
        return self.file is not None

    def read_into(self, memory: torch.Tensor) -> None:
        """Read the slab from its file.

        Args:
            memory: uint8 on the host, at least `nbytes`.

        Raises:
            OSError: The file cannot be read, or is shorter than it was.
        """
        assert self.file is not None
        view, done = memory.numpy().data, 0
        while done < self.nbytes:
            count = os.preadv(self.file, [view[done : self.nbytes]], done)
            if count == 0:
                raise OSError(f"a file of weights ends after {done} of {self.nbytes} bytes")
            done += count

    def over(self, memory: torch.Tensor) -> dict[str, QuantizedTensor]:
        """Return the weights as they are in other memory to which this slab was copied; views, by name."""
        tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self._likes}
        for part in self._parts:
            tensors[part.weight][part.name] = part.view(memory)
        return {name: _replace_tensors(like, tensors[name]) for name, like in self._likes.items()}


def slab_bytes(weights: Mapping[str, QuantizedTensor]) -> int:
    """Return the bytes that a slab of these weights takes."""
    return _end_of(_lay_out(weights))


def _replace_tensors(like: QuantizedTensor, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    return dataclasses.replace(
        like,
        packed=tensors["packed"],
        absmax=tensors["absmax"],
        absmax_scale=tensors.get("absmax_scale"),
        absmax_offset=tensors.get("absmax_offset"),
    )


def _lay_out(weights: Mapping[str, QuantizedTensor]) -> tuple[_Part, ...]:
    parts, place = [], 0
    for weight, quantized in weights.items():
        for name in PART_NAMES:
            tensor = getattr(quantized, name)
            if tensor is None:
                continue
            parts.append(_Part(weight, name, place, tensor.shape, tensor.dtype))
            place = -(-(place + tensor.nbytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tuple(parts)


def _end_of(parts: tuple[_Part, ...]) -> int:
    return parts[-1].first_byte + parts[-1].nbytes if parts else 0
