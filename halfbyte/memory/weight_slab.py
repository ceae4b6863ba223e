"""The 4-bit weights of one decoder block in one stretch of bytes, so that one copy moves them all.

    | q codes | q absmax | q scales | k codes | ...       each part starts at a multiple of 256 bytes

A slab's home is host memory that the driver has pinned: the only kind that a GPU reads at the full speed of its link,
and while it computes. Pinned is what the operating system gave us, page for page; torch's own pinned allocator would
round 418 MB (a block of 65B) up to 512.

Where host memory has no room for that, a slab's home is a file without a name, mapped: pages that the system needs for
something else go back to the disk. Such slabs are read ahead, see `read_ahead`.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.errors import PlanError
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
    """

    def __init__(
        self, weights: Mapping[str, QuantizedTensor], memory: torch.Tensor, *, file: int | None = None
    ) -> None:
        self._parts = _lay_out(weights)
        self._likes = dict(weights)
        self.nbytes = _end_of(self._parts)
        self.memory, self.file = memory[: self.nbytes], file
        if file is not None:
            weakref.finalize(self, os.close, file)
        for part in self._parts:
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


def allocate_pinned(num_bytes: int) -> torch.Tensor:
    """Return host memory, uint8, that the driver has pinned for all devices until nobody refers to it.

    Raises:
        PlanError: The system does not give or pin so much.
    """
    try:
        memory = _map_memory(num_bytes)
    except OSError as error:
        raise PlanError(f"the system gives no {num_bytes / 2**30:.2f} GiB of host memory: {error}") from error
    # The tensor holds this array, and the array's finalizer the mapping: pages are unpinned before they are unmapped.
    holder = np.frombuffer(memory, dtype=np.uint8)
    tensor = torch.from_numpy(holder)
    runtime = torch.cuda.cudart()
    address = tensor.data_ptr()
    status = runtime.cudaHostRegister(address, num_bytes, 0)
    if int(status) != 0:
        raise PlanError(
            f"the driver does not pin {num_bytes / 2**30:.2f} GiB of host memory ({status}): let more blocks stay on "
            "the device, or free host memory"
        )
    # The storage outlives every view of it; once it is gone, nothing on the host or in a stream we wait for reads it.
    weakref.finalize(holder, _unpin, runtime, address, memory)
    return tensor


def _unpin(runtime: Any, address: int, memory: mmap.mmap) -> None:
    assert not memory.closed
    status = runtime.cudaHostUnregister(address)
    if int(status) != 0:
        raise PlanError(f"the driver does not unpin host memory ({status})")


def allocate_on_disk(num_bytes: int, folder: Path) -> tuple[torch.Tensor, int]:
    """Return the mapping of a new file, uint8, and its descriptor; it has no name, and is gone with the process.

    Raises:
        PlanError: There is no such folder, or no room in it.
    """
    try:
        file, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
        # Blocks are taken now: a disk that fills up later would end the process by a signal.
        os.posix_fallocate(file, 0, num_bytes)
        mapping = mmap.mmap(file, num_bytes)
    except (OSError, AttributeError) as error:
        needed = f"{num_bytes / 2**30:.2f} GiB"
        raise PlanError(f"memory.spill_folder: {folder} has no {needed} for weights: {error}") from error
    return torch.frombuffer(mapping, dtype=torch.uint8), file


def _map_memory(num_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer pages to touch and to pin.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


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
