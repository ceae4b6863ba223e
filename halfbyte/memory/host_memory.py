"""Host memory for what visits a device: pinned, shared by the ranks of a host, or in files.

Pinned memory is the only kind that a GPU reads at the full speed of its link, and while it computes. Pinned is what the
operating system gave us, page for page; torch's own pinned allocator would round 418 MB (a block of 65B) up to 512.

The ranks of a host map one memory, and each pins its own mapping of it: weights are there once, however many GPUs they
are read by. It has no name that could be left behind: one rank makes a file that lives in memory alone, and the others
open it through that one's list of open files.

Where host memory has no room, a file without a name on a disk is mapped: pages that the system needs for something else
go back to the disk.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.distributed import ALONE, World
from halfbyte.errors import PlanError


def allocate_pinned(num_bytes: int) -> torch.Tensor:
    """Return host memory, uint8, that the driver has pinned for all devices until nobody refers to it.

    Raises:
        PlanError: The system does not give or pin so much.
    """
    try:
        memory = _map_memory(num_bytes)
    except OSError as error:
        raise PlanError(f"the system gives no {num_bytes / 2**30:.2f} GiB of host memory: {error}") from error
    return _pin(memory)


def allocate_shared(num_bytes: int, world: World, *, is_pinned: bool, owner: int = 0) -> torch.Tensor:
    """Return host memory, uint8, that is the same for all ranks of this host; all ranks must ask.

    Args:
        num_bytes: Of it.
        world: The ranks.
        is_pinned: Whether a GPU is fed from it.
        owner: Number among the ranks of the host, of the one that makes it.

    Raises:
        PlanError: The system does not give or pin so much.
    """

    def make() -> int:
        file = os.memfd_create("halfbyte-weights")
        os.truncate(file, num_bytes)
        return file

    try:
        file = share_file(make, world, owner=owner)
        memory = mmap.mmap(file, num_bytes)
        # The mapping stays.
        os.close(file)
    except (OSError, AttributeError) as error:
        needed = f"{num_bytes / 2**30:.2f} GiB"
        raise PlanError(f"the system gives no {needed} of memory that processes share: {error}") from error
    return _pin(memory) if is_pinned else torch.frombuffer(memory, dtype=torch.uint8)


def share_file(make: Callable[[], int], world: World, *, owner: int = 0) -> int:
    """Return a descriptor of one file for all ranks of each host, which one of them makes.

    Args:
        make: Returns a new file, which needs no name.
        world: The ranks.
        owner: Number of that one among the ranks of its host.

    Raises:
        OSError: It cannot be made or opened.
    """
    mine = make() if world.local_rank == owner else -1
    pid, made = world.gather([os.getpid(), mine])[world.rank - world.local_rank + owner]
    if world.local_rank != owner:
        mine = os.open(f"/proc/{pid}/fd/{made}", os.O_RDWR)
    # Its maker keeps it open until all have it.
    world.wait()
    return mine


def _pin(memory: mmap.mmap) -> torch.Tensor:
    # The tensor holds this array, and the array's finalizer the mapping: pages are unpinned before they are unmapped.
    holder = np.frombuffer(memory, dtype=np.uint8)
    tensor = torch.from_numpy(holder)
    runtime = torch.cuda.cudart()
    address = tensor.data_ptr()
    status = runtime.cudaHostRegister(address, len(memory), 0)
    if int(status) != 0:
        raise PlanError(
            f"the driver does not pin {len(memory) / 2**30:.2f} GiB of host memory ({status}): let more blocks stay on "
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


def allocate_on_disk(num_bytes: int, folder: Path, world: World = ALONE) -> tuple[torch.Tensor, int]:
    """Return the mapping of a new file, uint8, and its descriptor; it has no name, and is gone with the process.

    Args:
        num_bytes: Of it.
        folder: Where the disk is.
        world: Whose ranks on this host have the same file; all must ask.

    Raises:
        PlanError: There is no such folder, or no room in it.
    """

    def make() -> int:
        file, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
        # Blocks are taken now: a disk that fills up later would end the process by a signal.
        os.posix_fallocate(file, 0, num_bytes)
        return file

    try:
        file = share_file(make, world)
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
