"""Checkpoint tensors on their way to a GPU: file -> pinned memory -> device, all three busy at once.

Pageable memory reaches a GPU at a few GB/s, pinned memory at about 50, and one thread copies out of the page cache at 5
to 10. So several readers copy slices of the files straight into a small ring of pinned slots, and each slot goes to the
device on a copy stream while its reader fills another. No tensor exists in host memory.

    readers (threads)      read slice -> slot     read slice -> slot     ...
    copy stream                        slot -> device         slot -> device
    the caller's stream                                  quantise         ...

Waits, and what each protects:

* a reader waits for its slot's event before it writes: the copy out of the slot must have finished;
* the caller's stream waits for the copy stream before a tensor is handed out: its bytes must have arrived;
* `record_stream` keeps the allocator from giving a tensor's memory to the copy stream while the caller's stream still
  reads it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import queue
from collections.abc import Iterable, Iterator

import torch

from halfbyte.errors import FormatError
from halfbyte.models.weights import LazyTensor

# On an H100 host, 13.5 GB in the page cache reach the device in 0.48 s with these, in 0.6 s with 12 readers of 8 MiB,
# and in 2 s with slots of 2 MiB.
SLOT_BYTES = 16 << 20
MAX_READERS = 8
# Slots whose bytes are on their way while every reader fills another one.
SPARE_SLOTS = 4
# How far reading runs ahead of the caller; device memory pays for it.
AHEAD_BYTES = 256 << 20


def iter_on_device(tensors: Iterable[LazyTensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield each tensor on `device`, in order, ready for the current stream.

    On the CPU it may be a view of a mapped file, whose pages are dropped with the next one: copy what is kept, unless
    it may stay file.
    """
    if device.type != "cuda":
        for tensor in tensors:
            yield tensor.read()
        return
    num_readers = min(MAX_READERS, os.cpu_count() or 1)
    ring = _Ring(device, num_slots=num_readers + SPARE_SLOTS)
    pending: collections.deque[_Arrival] = collections.deque()
    ahead_bytes = 0
    with concurrent.futures.ThreadPoolExecutor(num_readers) as pool:
        for tensor in tensors:
            while pending and ahead_bytes + tensor.num_bytes > AHEAD_BYTES:
                ahead_bytes -= pending[0].num_bytes
                yield ring.receive(pending.popleft())
            pending.append(ring.send(tensor, pool))
            ahead_bytes += tensor.num_bytes
        while pending:
            yield ring.receive(pending.popleft())


@dataclasses.dataclass(slots=True, eq=False)
class _Slot:
    pinned: torch.Tensor
    copied: torch.cuda.Event | None = None


@dataclasses.dataclass(slots=True, eq=False)
class _Arrival:
    """A tensor whose bytes are being read."""

    value: torch.Tensor
    slices: list[concurrent.futures.Future[None]]

    @property
    def num_bytes(self) -> int:
        return self.value.nbytes


class _Ring:
    def __init__(self, device: torch.device, *, num_slots: int) -> None:
        self._copy_stream = torch.cuda.Stream(device)
        slab = torch.empty(num_slots * SLOT_BYTES, dtype=torch.uint8, pin_memory=True)
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for pinned in slab.split(SLOT_BYTES):
            self._free.put(_Slot(pinned))

    def send(self, tensor: LazyTensor, pool: concurrent.futures.ThreadPoolExecutor) -> _Arrival:
        """Start moving a tensor to the device."""
        with torch.cuda.stream(self._copy_stream):
            if tensor.offset is None:
                return _Arrival(tensor.read().to(self._copy_stream.device), [])
            raw = torch.empty(tensor.num_bytes, dtype=torch.uint8, device=self._copy_stream.device)
        starts = range(0, tensor.num_bytes, SLOT_BYTES)
        slices = [pool.submit(self._move, tensor, raw[start : start + SLOT_BYTES], start) for start in starts]
        return _Arrival(raw.view(tensor.dtype).view(tensor.shape), slices)

    def receive(self, arrival: _Arrival) -> torch.Tensor:
        """Return the tensor, which the current stream may read from now on."""
        for moved in arrival.slices:
            moved.result()
        current = torch.cuda.current_stream(self._copy_stream.device)
        current.wait_stream(self._copy_stream)
        arrival.value.record_stream(current)
        return arrival.value

    def _move(self, tensor: LazyTensor, on_device: torch.Tensor, start: int) -> None:
        assert tensor.offset is not None
        slot = self._free.get()
        try:
            if slot.copied is not None:
                slot.copied.synchronize()
            pinned = slot.pinned[: on_device.numel()]
            _read_into(tensor, pinned, tensor.offset + start)
            with torch.cuda.stream(self._copy_stream):
                on_device.copy_(pinned, non_blocking=True)
                slot.copied = self._copy_stream.record_event(slot.copied)
        finally:
            # Also after an error, or the readers behind this one would wait for ever.
            self._free.put(slot)


def _read_into(tensor: LazyTensor, buffer: torch.Tensor, offset: int) -> None:
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(offset)
        while len(view):
            num_read = file.readinto(view)
            if not num_read:
                raise FormatError(f"{tensor.path} became shorter while {tensor.name} was read")
            view = view[num_read:]
