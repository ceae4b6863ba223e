"""Programs run by several real processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """What torchrun left."""

    code: int
    output: str


def torchrun(ranks: int, words: Sequence[object], *, timeout: float = 240, options: Sequence[str] = ()) -> Finished:
    """Run a module (`-m name ...`) or a script by so many ranks, and return what they wrote."""
    with start_torchrun(ranks, words, options=options) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Finished(process.returncode, output)


def torchrun_hosts(hosts: int, ranks: int, words: Sequence[object], *, timeout: float = 240) -> list[Finished]:
    """Run a module or a script by so many ranks of each of several hosts, which are this one under several names."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", f"--nnodes={hosts}"]
    processes = [start_torchrun(ranks, words, options=[*meeting, "--local-addr=127.0.0.1"]) for _ in range(hosts)]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [Finished(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def start_torchrun(ranks: int, words: Sequence[object], *, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start so many ranks, and return torchrun's own process."""
    port = [] if any(option.startswith("--rdzv") for option in options) else [f"--master-port={free_port()}"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"),
        *(*port, *options, *map(str, words)),
    ]
    return _start(command, {})


def start_ranks(ranks: int, words: Sequence[object]) -> list[subprocess.Popen[str]]:
    """Start so many ranks without torchrun: nobody ends the others, and the first keeps the store.

    Each leads a process group of its own, so that what it has started can be ended with it.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    command = [sys.executable, *map(str, words)]
    return [
        _start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, leads=True) for rank in range(ranks)
    ]


def _start(command: Sequence[str], variables: Mapping[str, str], *, leads: bool = False) -> subprocess.Popen[str]:
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **common, **variables}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=leads,
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
