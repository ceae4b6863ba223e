"""The processes of one run, and what they tell each other.

Every process, a rank, runs the same program on its own device and its own share of each batch. They meet in a few
places only, all of which every rank passes in the same order:

    once           versions, configuration and data are compared; adapters are copied from rank 0
    each step      numbers of trained tokens are added up on the host, then gradients on the device
    each report    losses and speeds are added up

What is small goes over gloo between hosts' memories, so that nothing waits for a device; gradients go over NCCL, or
over gloo where ranks have no GPU of their own. Nothing that a rank sends is unpickled by another: it is numbers, or
JSON.

A rank alone, the usual case, meets nobody: each method returns at once.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    import torch

# Gradients that are sent while others are computed: short, so that little is left to do after a backward; long enough
# that starting it costs nothing beside it.
PIECE_BYTES = 2**23
# Tensors that lie apart are added up by so much, one bucket on its way while the next is put together.
BUCKET_BYTES = 2**25
# Of memory that tensors fill together, what may lie between them and is added up as well.
GAPS_SHARE = 0.1


class WorldError(HalfbyteError):
    """Ranks that do not fit together, or that were lost."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """All ranks, as one of them sees them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among the ranks of this host."""
    local_size: int = 1
    """Ranks of this host."""
    backend: str = "none"
    """What gradients go over: nccl or gloo."""
    hear_out: Callable[[], None] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Called where a connection has failed; does not return where it is known why."""

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def __str__(self) -> str:
        hosts = self.size // self.local_size
        on = "this host" if hosts == 1 else f"{hosts} hosts"
        return f"{self.size} ranks on {on}, gradients over {self.backend}"

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Return the sums of all ranks' numbers; over the host."""
        return tuple(self._reduce(numbers, "SUM"))

    def min(self, *numbers: float) -> tuple[float, ...]:
        """Return the smallest of all ranks' numbers; over the host."""
        return tuple(self._reduce(numbers, "MIN"))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank; anything that JSON can hold."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        with self._meeting("comparing notes"):
            dist.all_gather(lengths, torch.tensor(text.numel()))
            longest = max(int(length) for length in lengths)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: text.numel()] = text
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, padded)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Make sure that all ranks hold the same facts.

        Raises:
            WorldError: They do not; the message names what differs and where.
        """
        everyone = self.gather(dict(facts))
        for name, value in everyone[0].items():
            for rank, theirs in enumerate(everyone):
                if theirs.get(name) != value:
                    raise WorldError(
                        f"ranks differ in {name}: rank 0 has {value}, rank {rank} has {theirs.get(name)}; start all "
                        "with the same options, files and versions"
                    )

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.sum(0)

    def add_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by the sums of all ranks'; in the same order and shapes everywhere."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        pending: collections.deque[tuple[Any, torch.Tensor, list[torch.Tensor]]] = collections.deque()

        def finish() -> None:
            work, flat, bucket = pending.popleft()
            work.wait()
            pieces = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(t) for piece, t in zip(pieces, bucket, strict=True)])

        with self._meeting("adding up gradients"), torch.no_grad():
            whole = stretch_of(tensors)
            if whole is not None:
                dist.all_reduce(whole)
                return
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                pending.append((dist.all_reduce(flat, async_op=True), flat, bucket))
                if len(pending) == 2:
                    finish()
            while pending:
                finish()

    def begin_adding_(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Begin to replace a tensor by the sum of all ranks', and return what waits for it; in one order everywhere.

        On a GPU it begins behind what is launched so far, and what is launched after the waiting finds the sum.
        """
        import torch.distributed as dist

        purpose = "adding up gradients"
        with self._meeting(purpose):
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with self._meeting(purpose):
                work.wait()

        return wait

    def copy_from_main_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by rank 0's."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with self._meeting("copying adapters"), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def _reduce(self, numbers: Sequence[float], operation: str) -> list[float]:
        if self.size == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        values = torch.tensor(numbers, dtype=torch.float64)
        with self._meeting("adding up numbers"):
            dist.all_reduce(values, op=getattr(dist.ReduceOp, operation))
        return values.tolist()

    @contextlib.contextmanager
    def _meeting(self, purpose: str) -> Iterator[None]:
        """Say what has happened where a rank does not come."""
        try:
            yield
        except RuntimeError as error:
            # torch's errors of memory are RuntimeErrors too.
            if type(error).__name__ == "OutOfMemoryError":
                raise
            if self.hear_out is not None:
                self.hear_out()
            raise WorldError(
                f"rank {self.rank} of {self.size} lost another rank while {purpose}: its own message says why "
                f"({shorten(error)}). Checkpoints are whole: start all ranks again to go on from the last one"
            ) from error


ALONE = World()


def shorten(error: BaseException) -> str:
    """Return what a library's error says, without where in its sources and what it guesses."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S*\]\s*", "", lines[0]).partition(". ")[0]


def stretch_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the memory that tensors fill, as one tensor, or None where they lie apart."""
    first = tensors[0]
    storage = first.untyped_storage()
    if any(t.untyped_storage().data_ptr() != storage.data_ptr() or t.dtype != first.dtype for t in tensors):
        return None
    used_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if storage.nbytes() > used_bytes * (1 + GAPS_SHARE):
        return None
    return first.new_empty(0).set_(storage)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield runs of tensors of BUCKET_BYTES or a little more; the same on every rank."""
    bucket: list[torch.Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        bucket.append(tensor)
        num_bytes += tensor.numel() * tensor.element_size()
        if num_bytes >= BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
    if bucket:
        yield bucket
