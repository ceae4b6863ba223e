"""What adding up gradients beside the backward is worth where hosts are far apart, shown by two of one machine.

    sudo python -m benchmarks.slow_link --mbit 100

Each rank runs in a network namespace of its own, with its own addresses, as a host would: nothing joins the two but a
pair of virtual cards, which send no faster than was asked for. Both train the shape of SmolLM2-135M on the CPU, once
with gradients added up after the backward, once beside it. Linux with `ip` and `tc`; as root. One JSON line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

HOSTS = ("halfbyte-a", "halfbyte-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29513


@contextlib.contextmanager
def two_hosts(mbit: int) -> Iterator[None]:
    """Have two network namespaces joined by a link of some Mb/s each way."""
    try:
        for host in HOSTS:
            call("ip", "netns", "add", host)
            inside(host, "ip", "link", "set", "lo", "up")
        call(
            "ip", "link", "add", "link0", "netns", HOSTS[0], "type", "veth", "peer", "name", "link0", "netns", HOSTS[1]
        )
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            inside(host, "ip", "address", "add", f"{address}/24", "dev", "link0")
            inside(host, "ip", "link", "set", "link0", "up")
            limit = ("rate", f"{mbit}mbit", "burst", "256kb", "latency", "200ms")
            inside(host, "tc", "qdisc", "add", "dev", "link0", "root", "tbf", *limit)
        yield
    finally:
        for host in HOSTS:
            subprocess.run(("ip", "netns", "delete", host), check=False, capture_output=True)


def call(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)


def inside(host: str, *command: str) -> None:
    """Run one in a namespace."""
    call("ip", "netns", "exec", host, *command)


def train(*options: str) -> dict[str, object]:
    """Train on both hosts and return what the first says."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "link0", "OMP_NUM_THREADS": "1"}
    world = ("--nnodes=2", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}")
    program = ("-m", "benchmarks.bench_ranks", "--device", "cpu", *options)
    hosts = []
    for number, host in enumerate(HOSTS):
        torchrun = (sys.executable, "-m", "torch.distributed.run", *world, f"--node-rank={number}")
        command = ("ip", "netns", "exec", host, *torchrun, *program)
        hosts.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [host.communicate()[0] for host in hosts]
    if any(host.returncode for host in hosts):
        raise SystemExit(f"a host has failed: {[host.returncode for host in hosts]}")
    row: dict[str, object] = json.loads(outputs[0].strip().splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, nargs="+", default=[100])
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    settings = ("--model", "SmolLM2-135M", "--batch", "2", "--seq", "256", "--steps", str(options.steps))
    for mbit in options.mbit:
        for flags in (("--after",), ()):
            with two_hosts(mbit):
                print(json.dumps({"link_mbit": mbit, **train(*settings, *flags)}), flush=True)


if __name__ == "__main__":
    main()
