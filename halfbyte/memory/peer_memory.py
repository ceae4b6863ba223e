"""Memory of one rank's device that the other ranks of its host read by themselves.

Nobody sends anything. A rank tells the others once where its memory is, and they copy from it whenever they want, for
what it holds never changes: frozen weights. So ranks need not be at the same place of their work, a rank that has no
micro-batch hinders nobody, and one of them may generate samples alone.

On GPUs these are CUDA's handles of memory between processes, passed on as torch.multiprocessing passes its tensors.
Copies are made by the cards' copy engines, over NVLink or, where the driver lets cards reach each other so, over PCIe.
On a CPU it is memory that processes share.
"""

from __future__ import annotations

import base64
import logging
from typing import Any

import torch

from halfbyte.distributed import World
from halfbyte.errors import PlanError
from halfbyte.memory.host_memory import allocate_shared

PROBE_BYTES = 2**21
# Of the arguments that rebuild a tensor of CUDA in another process, those that say where its memory is.
_PLACE = slice(6, None)
_log = logging.getLogger(__name__)


def allocate_at(owner: int, num_bytes: int, *, world: World, device: torch.device) -> torch.Tensor:
    """Return memory, uint8, of the device of one rank of each host; all ranks must ask, in the same order.

    It lives until the owner lets go of it, and others must not read it after that.

    Args:
        owner: Number among the ranks of a host. It writes the memory, and the others read it after `world.wait()`.
        num_bytes: Of it.
        world: The ranks.
        device: Where each of them computes.

    Raises:
        PlanError: The system gives no memory that processes share, or the owner has none to share.
        RuntimeError: The driver does not let this card read that memory.
    """
    if device.type != "cuda":
        return allocate_shared(num_bytes, world, is_pinned=False, owner=owner)
    memory, place = None, None
    try:
        if world.local_rank == owner:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            place = _place_of(memory)
    finally:
        # The others are waiting for an answer, whatever came of it.
        place = world.gather(place)[world.rank - world.local_rank + owner]
    if place is None:
        raise PlanError(f"rank {owner} of this host shares no memory of its device with the others")
    return _open(place, device) if memory is None else memory


def reach_each_other(world: World, device: torch.device) -> bool:
    """Say whether the ranks of each host can read the memory of each other's devices, by doing it.

    All ranks must ask, and get the same answer.
    """
    if device.type != "cuda" or world.local_size == 1:
        return True
    works = [_can_read(owner, world, device) for owner in range(world.local_size)]
    return bool(world.min(all(works))[0])


def _can_read(owner: int, world: World, device: torch.device) -> bool:
    """Have one rank of each host write a pattern, and return whether this rank finds it there."""
    pattern = (torch.arange(PROBE_BYTES, dtype=torch.int64) * (owner + 3) % 251).to(torch.uint8)
    try:
        memory = allocate_at(owner, PROBE_BYTES, world=world, device=device)
        if world.local_rank == owner:
            memory.copy_(pattern)
            torch.cuda.synchronize(device)
        error: Exception | None = None
    except (RuntimeError, PlanError) as one:
        error = one
    world.wait()
    found = error is None and torch.equal(torch.empty_like(memory).copy_(memory).cpu(), pattern)
    if not found:
        _log.info("rank %d does not reach the memory of rank %d of its host: %s", world.rank, owner, error)
    # The owner's memory outlives its readers.
    world.wait()
    return found


def _place_of(memory: torch.Tensor) -> list[Any]:
    """Return where memory of CUDA is, for other processes; what JSON can hold."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(memory)
    return [{"bytes": base64.b64encode(one).decode()} if isinstance(one, bytes) else one for one in arguments[_PLACE]]


def _open(place: list[Any], device: torch.device) -> torch.Tensor:
    """Return memory of another process, on whatever card; torch counts it to `device`."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    # A rank sees one card, which is number 0 to it, as the other's was to the other.
    _, *rest = [base64.b64decode(one["bytes"]) if isinstance(one, dict) else one for one in place]
    num_bytes = place[2]
    shape = (torch.Tensor, torch.Size([num_bytes]), (1,), 0, torch.UntypedStorage, torch.uint8, device.index or 0)
    opened: torch.Tensor = rebuild_cuda_tensor(*shape, *rest)
    return opened
