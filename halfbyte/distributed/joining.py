"""Becoming one of several ranks: what torchrun tells a process, and a device of one's own.

After joining, a rank looks like a process alone to every library: it sees one GPU, and RANK, WORLD_SIZE and their like
are gone. Otherwise the trainer's libraries would each divide batches and add up gradients as well.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

from halfbyte.distributed.heartbeat import SILENCE_SECONDS, Heart, Place
from halfbyte.distributed.world import ALONE, World, WorldError, shorten

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
AGENT_KEEPS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
# Longer than any rank may be busy alone: loading a model, writing a checkpoint. Ranks that vanish meanwhile are noticed
# by their missing heartbeats.
PATIENCE = datetime.timedelta(minutes=20)

_joined: list[World] = []
_hearts: list[Heart] = []


def current_world() -> World:
    """Return the world that this process has joined; a process alone has one of its own."""
    return _joined[-1] if _joined else ALONE


def num_ranks() -> int:
    """Return how many processes torchrun has started, before or after they have joined."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if not _joined and size.isdecimal() else current_world().size


@contextlib.contextmanager
def join_world(*, on_cpu: bool = False, silence_seconds: float = SILENCE_SECONDS) -> Iterator[World]:
    """Be one of the ranks that torchrun has started, inside the `with` block; alone where it has started none.

    Args:
        on_cpu: Whether training is to be on the CPU, whatever GPUs there are.
        silence_seconds: How long a rank may be silent until the others take it for lost and end; see `heartbeat`.

    Raises:
        WorldError: The ranks cannot find each other.
    """
    world = enter_world(on_cpu=on_cpu, silence_seconds=silence_seconds)
    try:
        yield world
    except BaseException:
        # Whatever ended it, Ctrl-C too, goes on its way. The others may be waiting for this rank: its end tells them,
        # and an orderly goodbye would wait for them.
        _joined.clear()
        _stop_heart(goodbye=False)
        raise
    leave_world()


def enter_world(*, on_cpu: bool = False, silence_seconds: float = SILENCE_SECONDS) -> World:
    """Join, and stay; see `join_world`."""
    if _joined or "WORLD_SIZE" not in os.environ:
        return current_world()
    if os.environ["WORLD_SIZE"] == "1":
        _forget_environment()
        return current_world()
    rank, size, local_rank, local_size = _read_environment()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    has_own_gpu = False
    if not on_cpu and torch.cuda.device_count():
        has_own_gpu = local_size <= torch.cuda.device_count()
        _choose_gpu(local_rank)
    backend = "cpu:gloo,cuda:nccl" if has_own_gpu else "gloo"
    try:
        store, *_ = next(rendezvous("env://", rank, size, timeout=PATIENCE))
        # Ranks that torchrun starts again must not find where those before them were.
        prefix = f"attempt-{os.environ.get(ATTEMPT, '0')}"
        keeps_store = rank == 0 and os.environ.get(AGENT_KEEPS_STORE) != "True"
        meeting = _without_prefix(store)
        place = Place(
            host=meeting.host, port=meeting.port, prefix=prefix, rank=rank, size=size, keeps_store=keeps_store
        )
        heart = Heart(place, limit_seconds=silence_seconds)
        heart.introduce(meeting)
        store = dist.PrefixStore(prefix, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WorldError(
            f"rank {rank} of {size} cannot meet the others at {where}: {shorten(error)}. Is the port in use by another "
            "run (torchrun --rdzv-endpoint=HOST:PORT chooses one), and does every host reach it?"
        ) from error
    heart.start()
    _hearts.append(heart)
    _forget_environment()
    _joined.append(
        World(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            backend=backend.rpartition(":")[2],
            hear_out=heart.hear_out,
        )
    )
    return current_world()


def leave_world() -> None:
    """Say goodbye, once all are done."""
    if _joined:
        import torch.distributed as dist

        try:
            _joined.pop().wait()
        except BaseException:
            # As in `join_world`: whatever ended the waiting goes on its way, and this rank is not to be waited for.
            _stop_heart(goodbye=False)
            raise
        _stop_heart(goodbye=True)
        dist.destroy_process_group()


def _without_prefix(store: Any) -> Any:
    """Return the store of torchrun's own, which some releases of torch wrap for each attempt."""
    import torch.distributed as dist

    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _stop_heart(*, goodbye: bool) -> None:
    while _hearts:
        _hearts.pop().stop(goodbye=goodbye)


def _read_environment() -> tuple[int, ...]:
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise WorldError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {error} is not what torchrun sets; start with torchrun "
            "--nproc-per-node=N -m halfbyte train ..."
        ) from error
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise WorldError(f"rank {rank} of {size}, {local_rank} of {local_size} here: such a world cannot be")
    return rank, size, local_rank, local_size


def _forget_environment() -> None:
    for name in VARIABLES:
        os.environ.pop(name, None)


def _choose_gpu(local_rank: int) -> None:
    """Let this process see one GPU; several ranks share one where there are too few."""
    import torch

    if torch.cuda.is_initialized():
        raise WorldError("a GPU was used before the ranks met; call halfbyte.join_world() first")
    visible = os.environ.get(VISIBLE_GPUS)
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    os.environ[VISIBLE_GPUS] = names[local_rank % len(names)]
