"""How long a step waits for gradients where hosts are far apart, shown by two of one machine.

    sudo python -m benchmarks.slow_link --mbit 100

Each rank runs in a network namespace of its own, with its own addresses, as a host would: nothing joins the two but a
pair of virtual cards, which send no faster than was asked for. Both train the shape of SmolLM2-135M on the CPU, once
with gradients added up after the backward, once beside it. Linux with `ip` and `tc`; as root. One JSON line each, with
the median milliseconds of a step, and of those in which the first rank did nothing but wait for gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.bench_memory import MODELS
from benchmarks.bench_ranks import time_exchange
from benchmarks.bench_train import StepTimer, to_examples
from benchmarks.random_model import build_random_4bit
from halfbyte.distributed import World, join_world
from halfbyte.distributed.world import PIECE_BYTES
from halfbyte.nn import LoraSpec, attach_adapters
from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions
from halfbyte.train.micro_batch import lay_side_by_side

HOSTS = ("halfbyte-a", "halfbyte-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29513
ROWS, ROW_TOKENS, ACCUMULATION = 2, 256, 2


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


def train(world: World, *, steps: int, piece_bytes: int) -> dict[str, object]:
    """Train as one rank and return milliseconds."""
    model = build_random_4bit(MODELS["SmolLM2-135M"], torch.device("cpu"))
    attach_adapters(model, LoraSpec(seed=0))
    blocks = np.random.default_rng(0).integers(4, 49152, (ROWS * ACCUMULATION * steps * world.size, ROW_TOKENS))
    timer, waited = StepTimer(torch.device("cpu")), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        arguments = HalfbyteArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=ACCUMULATION,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = HalfbyteTrainer(
            model,
            arguments,
            train_dataset=to_examples(blocks),
            callbacks=[timer],
            options=TrainerOptions(row_tokens=ROW_TOKENS),
        )
        runner = trainer.micro_batches
        runner.exchange.piece_bytes = piece_bytes
        finish = runner.exchange.finish

        def finish_timed() -> None:
            started = time.perf_counter()
            finish()
            waited.append(time.perf_counter() - started)

        runner.exchange.finish = finish_timed  # type: ignore[method-assign]
        trainer.train()
    alone = time_exchange(world, lay_side_by_side(runner.parameters))
    times = {"step_ms": timer.seconds[1:], "waited_ms": waited[1:]}
    return {name: round(1e3 * statistics.median(seconds)) for name, seconds in times.items()} | {"alone_ms": alone}


def run_hosts(*options: str) -> dict[str, object]:
    """Train on both hosts and return what the first says."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "link0", "OMP_NUM_THREADS": "1"}
    world = ("--nnodes=2", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}")
    program = ("-m", "benchmarks.slow_link", "--rank", *options)
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
    parser.add_argument("--rank", action="store_true", help="be one of the ranks")
    parser.add_argument("--piece-bytes", type=int, default=PIECE_BYTES)
    options = parser.parse_args()
    if options.rank:
        with join_world(on_cpu=True) as world:
            row = train(world, steps=options.steps, piece_bytes=options.piece_bytes)
            if world.is_main:
                print(json.dumps(row), flush=True)
        return
    for mbit in options.mbit:
        for when, piece_bytes in (("after the backward", 2**60), ("beside the backward", options.piece_bytes)):
            with two_hosts(mbit):
                row = run_hosts("--steps", str(options.steps), "--piece-bytes", str(piece_bytes))
            print(json.dumps({"link_mbit": mbit, "gradients": when, **row}), flush=True)


if __name__ == "__main__":
    main()
