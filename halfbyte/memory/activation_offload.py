"""Activations in pinned host memory between the forward of a block and its backward.

A block puts its widest tensors away as soon as they are computed, and its backward gets them back. Copies run on a
stream of their own while the compute stream goes on, out during the forward, in during the backward, one block ahead:

    compute    | block 1 | block 2 | block 3 | ...          ... | block 3 | block 2 | block 1 |
    copies       out 1 ..  out 2 ..  out 3 ..                 in 3  in 2 ..   in 1 ..

What is on the device at a time is two blocks' tensors: in the forward those being computed and those being copied, in
the backward those in use and those arriving. The last block finds its own still there.

Who may reuse which memory. Every tensor on the device is allocated and freed by the compute stream; the copy stream
only borrows it. A borrowing begins when the copy stream waits for the compute stream and ends when the compute stream
waits for the copy; in between this class holds a reference. Therefore the caching allocator, which knows the compute
stream alone, is right about what is free, in the pool of a CUDA graph too; and when no borrowing is left, the copy
stream has been joined, as the capture of a graph demands. Host memory is read and written by the copy stream alone, in
order. Nothing waits on the host.

Pinned memory is allocated on the first pass and used again in every later one. torch's pinned allocator rounds up to
powers of two; memory comes in up to 5 pieces of such sizes, which wastes at most a sixteenth.

On a CPU the tensors are in host memory already, and stay what they are.

Price: 54 GB/s each way on an H100, so that a block hides its copies if its forward takes longer than they do.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator

import torch

SMALLEST_PIECE_BYTES = 4096
# Puts whose copies may go on while the next block computes.
IN_FLIGHT = 1


@dataclasses.dataclass(eq=False, slots=True)
class _Borrowing:
    """Tensors on the device that the copy stream reads or writes until `done`."""

    tensors: tuple[torch.Tensor, ...]
    """Empty once the compute stream has waited."""
    done: torch.cuda.Event


class _HostBuffer:
    """Pinned memory for what one `put` puts away."""

    def __init__(self, num_bytes: int) -> None:
        self.pieces = [torch.empty(n, dtype=torch.uint8, pin_memory=True) for n in piece_sizes(num_bytes)]
        self.nbytes = sum(piece.numel() for piece in self.pieces)
        self.writer: weakref.ref[Offloaded] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody is going to ask for what it holds."""
        writer = None if self.writer is None else self.writer()
        return writer is None or writer.was_read

    def pairs(self, tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parts of the tensors, as bytes, with their places in this buffer."""
        pieces, place = iter(self.pieces), 0
        piece = next(pieces)
        for tensor in tensors:
            flat = tensor.view(-1).view(torch.uint8)
            start = 0
            while start < flat.numel():
                if place == piece.numel():
                    piece, place = next(pieces), 0
                length = min(flat.numel() - start, piece.numel() - place)
                yield flat[start : start + length], piece[place : place + length]
                start, place = start + length, place + length


class Offloaded:
    """What one call of `put` has put away."""

    def __init__(self, number: int, tensors: tuple[torch.Tensor, ...]) -> None:
        self.number = number
        self.likes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        self.resident: tuple[torch.Tensor, ...] | None = None
        """On a CPU, where tensors stay what they are."""
        self.buffer: _HostBuffer | None = None
        self.borrowing: _Borrowing | None = None
        self.was_read = False

    @property
    def is_on_device(self) -> bool:
        """Whether nothing has to be fetched."""
        return self.borrowing is not None and bool(self.borrowing.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in self.likes)


class ActivationOffload:
    """Activations of one model that are put away. Serves one stream of execution a card, with or without a graph."""

    def __init__(self) -> None:
        self._buffers: list[_HostBuffer] = []
        self._borrowings: list[_Borrowing] = []
        self._copies: dict[torch.device, torch.cuda.Stream] = {}
        """One for each card."""
        self._count = 0
        self.num_releases = 0
        """As long as it stays the same, what was pinned once is not pinned again, which no capture can do."""

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned memory."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def host_memory(self) -> tuple[torch.Tensor, ...]:
        """The pinned memory, for a graph to hold as long as it may be launched."""
        return tuple(piece for buffer in self._buffers for piece in buffer.pieces)

    def make_room(self) -> None:
        """Let go of what has been put away, but for the last: to be called when the forward of a block ends."""
        while len(self._borrowings) > IN_FLIGHT:
            self._end(self._borrowings[0])

    def put(self, *tensors: torch.Tensor) -> Offloaded:
        """Begin to copy tensors to the host. They must not be written to from here on.

        Args:
            *tensors: Contiguous, on one device.
        """
        self._count += 1
        tensors = tuple(tensor.detach() for tensor in tensors)
        offloaded = Offloaded(self._count, tensors)
        if tensors[0].device.type != "cuda":
            offloaded.resident = tensors
            return offloaded
        offloaded.buffer = buffer = self._take_buffer(offloaded.nbytes)
        buffer.writer = weakref.ref(offloaded)
        with torch.cuda.stream(self._fork(tensors[0].device)):
            for source, target in buffer.pairs(tensors):
                target.copy_(source, non_blocking=True)
        offloaded.borrowing = self._borrow(tensors)
        return offloaded

    def get(self, offloaded: Offloaded) -> tuple[torch.Tensor, ...]:
        """Return the tensors, ready for the current stream, and begin to fetch those that were put before them.

        Raises:
            RuntimeError: This is a second backward of a retained graph, and another forward has come between.
        """
        if offloaded.resident is not None:
            return offloaded.resident
        if not offloaded.is_on_device:
            self._fetch(offloaded)
        assert offloaded.borrowing is not None
        tensors = offloaded.borrowing.tensors
        self._end(offloaded.borrowing)
        offloaded.was_read = True
        before = self._put_before(offloaded)
        if before is None:
            # The last of a backward.
            self.join()
        elif not before.is_on_device:
            self._fetch(before)
        return tensors

    def join(self) -> None:
        """Have the current stream wait for all copies, and let go of what they read: before and after a capture."""
        while self._borrowings:
            self._end(self._borrowings[0])

    def release(self) -> None:
        """Give the pinned memory back; graphs that hold `host_memory` keep theirs."""
        for card in self._copies:
            torch.cuda.synchronize(card)
        self.join()
        self.num_releases += 1
        if self._buffers:
            self._buffers.clear()
            _empty_host_cache()

    def _fetch(self, offloaded: Offloaded) -> None:
        buffer = offloaded.buffer
        assert buffer is not None
        if buffer.writer is None or buffer.writer() is not offloaded:
            raise RuntimeError("offloaded activations are gone: a second backward must come before the next forward")
        tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in offloaded.likes)
        with torch.cuda.stream(self._fork(tensors[0].device)):
            for target, source in buffer.pairs(tensors):
                target.copy_(source, non_blocking=True)
        offloaded.borrowing = self._borrow(tensors)

    def _fork(self, device: torch.device) -> torch.cuda.Stream:
        """Return the copy stream, behind everything that the current stream has been given so far."""
        if device not in self._copies:
            self._copies[device] = torch.cuda.Stream(device)
        copies = self._copies[device]
        # Out: protects the tensors, which kernels before are still writing. In: protects the memory that the tensors
        # were given, which kernels before may still use for what was freed there.
        copies.wait_stream(torch.cuda.current_stream(device))
        return copies

    def _borrow(self, tensors: tuple[torch.Tensor, ...]) -> _Borrowing:
        borrowing = _Borrowing(tensors, self._copies[tensors[0].device].record_event())
        self._borrowings.append(borrowing)
        return borrowing

    def _end(self, borrowing: _Borrowing) -> None:
        """Have the current stream wait for a copy, after which the tensors are its own again."""
        # Out: protects the memory of the tensors, which is free for other kernels once nobody refers to it, while the
        # copy may still read. In: protects those who read the tensors, which the copy is still filling.
        torch.cuda.current_stream(borrowing.tensors[0].device).wait_event(borrowing.done)
        self._borrowings.remove(borrowing)
        borrowing.tensors = ()

    def _put_before(self, offloaded: Offloaded) -> Offloaded | None:
        """Return the last of those that were put before, and are still to be read."""
        written = [buffer.writer() for buffer in self._buffers if buffer.writer is not None]
        pending = [other for other in written if other is not None and not other.was_read]
        before = [other for other in pending if other.number < offloaded.number]
        return max(before, key=lambda other: other.number, default=None)

    def _take_buffer(self, num_bytes: int) -> _HostBuffer:
        free = [buffer for buffer in self._buffers if buffer.is_free]
        fitting = next((buffer for buffer in free if buffer.nbytes >= num_bytes), None)
        if fitting is None:
            if free:
                self._buffers.remove(free[0])
            fitting = _HostBuffer(num_bytes)
            self._buffers.append(fitting)
        return fitting


def piece_sizes(num_bytes: int) -> list[int]:
    """Return powers of two whose sum is at least `num_bytes`, and at most a sixteenth or a smallest piece more."""
    unit = max(1 << max(num_bytes.bit_length() - 5, 0), SMALLEST_PIECE_BYTES)
    total = max(-(-num_bytes // unit), 1) * unit
    return [1 << bit for bit in reversed(range(total.bit_length())) if total >> bit & 1]


def _empty_host_cache() -> None:
    # Public since torch 2.12 or so; before that the same function has another name.
    public = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    empty = public or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()
