"""Blocks of frozen weights that live in host memory and visit the device when they are needed.

A ring of a few slots on the device, each as large as the largest block. A block is fetched by one copy, on a stream of
its own, while those before it compute: in order during the forward, in reverse order during the backward. The last
blocks of a forward are still there when the backward begins with them, and the first when the next forward does.

    compute     | block 1 | block 2 | block 3 | ...          ... | block 3 | block 2 | block 1 |
    copies        2    3     4         5                           2    1

Who may touch a slot. A copy into a slot is put behind everything that the compute stream has been given so far:
whoever read the slot's last block has been given before. A block reads its slot after it waited for that slot's copy.
With three slots a copy has the time of two blocks, and so may be late for one of them.

Whatever order blocks come in, the result is right: one that is not there is fetched and waited for.

Slabs that live in files are read into pinned buffers by a thread, in the same order and further ahead; then the host
waits for the disk where the disk is slower than computing, and no graph can be recorded.

On a CPU slots are memory like the home of a block, and copies happen at once: for tests.

Price: a block crosses the link once in each pass. It hides where computing it takes longer than that: 418 MB, a block
of 65B, take 7.7 ms over 54 GB/s, and its forward 9 ms for 4096 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from halfbyte.errors import PlanError
from halfbyte.memory.read_ahead import ReadAhead
from halfbyte.memory.run_shape import DEFAULT_SLOTS, READ_BUFFERS
from halfbyte.memory.weight_slab import WeightSlab
from halfbyte.quant.tensor import QuantizedTensor

MIN_SLOTS = 2


class Tenant(Protocol):
    """A block whose weights visit the device."""

    slab: WeightSlab

    def settle(self, weights: Mapping[str, QuantizedTensor]) -> None:
        """Use these weights from now on."""

    def leave(self) -> None:
        """Use them no more: other weights are about to be written over them."""


@dataclasses.dataclass(eq=False, slots=True)
class _Slot:
    memory: torch.Tensor
    index: int | None = None
    """Of the block that it holds, or is being given."""
    arrived: torch.cuda.Event | None = None


class BlockStreamer:
    """Brings the blocks of one model to a device. Serves one stream of execution, with or without a graph.

    Args:
        device: Where blocks compute.
        num_slots: How many blocks are there at a time.
    """

    def __init__(self, device: torch.device, *, num_slots: int = DEFAULT_SLOTS) -> None:
        if num_slots < MIN_SLOTS:
            raise PlanError(f"{num_slots} slots: weights need at least {MIN_SLOTS} to arrive while others are used")
        self.device, self.num_slots = device, num_slots
        self._tenants: list[Tenant] = []
        self._slots: list[_Slot] = []
        self._views: dict[tuple[int, int], dict[str, QuantizedTensor]] = {}
        self._copies: torch.cuda.Stream | None = None
        self._read_ahead: ReadAhead | None = None

    @property
    def reads_files(self) -> bool:
        """Whether the host has a part in bringing blocks, so that no graph can do it."""
        return any(tenant.slab.is_on_disk for tenant in self._tenants)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots on the device."""
        return min(self.num_slots, len(self._tenants)) * max((t.slab.nbytes for t in self._tenants), default=0)

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks in host memory."""
        return sum(tenant.slab.nbytes for tenant in self._tenants)

    def admit(self, tenant: Tenant) -> int:
        """Take care of one more block, which comes after those before it, and return its number."""
        self.release()
        self._tenants.append(tenant)
        return len(self._tenants) - 1

    def enter(self, index: int, *, backward: bool) -> None:
        """Settle a block for what is launched next on the current stream, and begin to fetch those that come after it.

        Args:
            index: Number of the block.
            backward: Whether the one before it comes next, not the one after it.
        """
        wanted = self._wanted(index, backward=backward, count=self.num_slots)
        self._begin_reading(self._wanted(index, backward=backward, count=self.num_slots + READ_BUFFERS))
        for one in wanted:
            if one == index or self._is_at_hand(one):
                self._fetch(one, keep=wanted)
        slot = self._slot_of(index)
        assert slot is not None
        if slot.arrived is not None:
            # Protects the reader, whose weights the copy is still writing.
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        self._tenants[index].settle(self._views_of(slot, index))

    def forget(self) -> None:
        """Assume nothing about what the slots hold: before and after kernels that a graph records or launches."""
        if self._copies is not None:
            # A capture ends with one stream, and begins with nothing to wait for.
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        for slot in self._slots:
            self._vacate(slot)

    def release(self) -> None:
        """Give the slots back, until a block enters again."""
        self.forget()
        self._slots.clear()
        self._views.clear()
        if self._read_ahead is not None:
            self._read_ahead.close()
            self._read_ahead = None

    def _wanted(self, index: int, *, backward: bool, count: int) -> list[int]:
        """Return the next blocks to be needed, the first being the one that is needed now."""
        count = min(count, len(self._tenants))
        ahead = range(index, index - count, -1) if backward else range(index, index + count)
        return [one for one in ahead if 0 <= one < len(self._tenants)]

    def _fetch(self, index: int, *, keep: Sequence[int]) -> None:
        if self._slot_of(index) is not None:
            return
        if not self._slots:
            self._make_slots()
        # One is free or held by a block that is not wanted: there are as many slots as blocks are wanted at most.
        slot = next(slot for slot in self._slots if slot.index is None or slot.index not in keep)
        self._vacate(slot)
        slab = self._tenants[index].slab
        source = self._source_of(index, slab)
        if self.device.type == "cuda":
            if self._copies is None:
                self._copies = torch.cuda.Stream(self.device)
            # Protects the slot's last block, which kernels launched before may still read.
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._copies):
                slot.memory[: slab.nbytes].copy_(source, non_blocking=True)
                slot.arrived = self._copies.record_event()
        else:
            slot.memory[: slab.nbytes].copy_(source)
        if slab.is_on_disk:
            assert self._read_ahead is not None
            self._read_ahead.give_back(index, slot.arrived)
        slot.index = index

    def _begin_reading(self, coming: Sequence[int]) -> None:
        """Have those of the next blocks read that live in files and are not in the slots."""
        missing = [one for one in coming if self._slot_of(one) is None]
        slabs = [(one, slab) for one in missing if (slab := self._tenants[one].slab).is_on_disk]
        if slabs and self._read_ahead is None:
            largest = max(tenant.slab.nbytes for tenant in self._tenants if tenant.slab.is_on_disk)
            self._read_ahead = ReadAhead(largest, is_pinned=self.device.type == "cuda")
        if self._read_ahead is not None:
            self._read_ahead.prepare(slabs)

    def _is_at_hand(self, index: int) -> bool:
        """Say whether a block can be fetched without waiting for a disk."""
        if not self._tenants[index].slab.is_on_disk:
            return True
        return self._read_ahead is not None and self._read_ahead.has_arrived(index)

    def _source_of(self, index: int, slab: WeightSlab) -> torch.Tensor:
        """Return memory that a copy can be made from: the slab's own, or a buffer that it was read into."""
        if not slab.is_on_disk:
            return slab.memory
        assert self._read_ahead is not None
        return self._read_ahead.take(index, slab)

    def _make_slots(self) -> None:
        num_bytes = max(tenant.slab.nbytes for tenant in self._tenants)
        count = min(self.num_slots, len(self._tenants))
        self._slots = [_Slot(torch.empty(num_bytes, dtype=torch.uint8, device=self.device)) for _ in range(count)]

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.index == index), None)

    def _vacate(self, slot: _Slot) -> None:
        if slot.index is not None:
            self._tenants[slot.index].leave()
        slot.index = slot.arrived = None

    def _views_of(self, slot: _Slot, index: int) -> dict[str, QuantizedTensor]:
        key = self._slots.index(slot), index
        if key not in self._views:
            self._views[key] = self._tenants[index].slab.over(slot.memory)
        return self._views[key]
