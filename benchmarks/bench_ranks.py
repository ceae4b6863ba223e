"""Training by several ranks, beside one.

    torchrun --nproc-per-node=2 -m benchmarks.bench_ranks --model Llama-7B
    torchrun --nproc-per-node=2 -m benchmarks.bench_ranks --model Llama-65B --cap 24 --streamed 78 --ckpt offload
    torchrun --nproc-per-node=2 -m benchmarks.bench_ranks --model Llama-65B --cap 26 --streamed 80 --sharded \\
        --ckpt offload

Random 4-bit weights and the settings of `bench_train`: unless said otherwise 4 x 1024 tokens a micro-batch and rank, an
optimizer step every second one. With --streamed the ranks of a host read one copy of those blocks' weights, with
--sharded from each other's cards. With --after gradients are added up after the backward instead of beside it. One JSON
line: tokens a second of all ranks together, the milliseconds that adding up gradients takes by itself, and every rank's
memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from benchmarks.bench_memory import MODELS
from benchmarks.bench_train import CHECKPOINTING, Setting, measure_speed
from benchmarks.random_model import build_random_4bit
from halfbyte.device import default_device, peak_resident_bytes
from halfbyte.distributed import World, join_world
from halfbyte.distributed.world import PIECE_BYTES
from halfbyte.nn import iter_trainable
from halfbyte.train.micro_batch import lay_side_by_side

ROUNDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="Llama-7B")
    parser.add_argument("--cap", type=float, help="GiB of device memory that each rank may reserve")
    parser.add_argument("--streamed", type=int, default=0, help="blocks whose weights live in host memory")
    parser.add_argument("--sharded", action="store_true", help="they live on one of the ranks' cards each instead")
    parser.add_argument("--after", action="store_true", help="add up gradients after the backward, all in one piece")
    parser.add_argument("--ckpt", choices=tuple(CHECKPOINTING), default="0")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with join_world(on_cpu=options.device == "cpu") as world:
        device = default_device() if options.device == "cuda" else torch.device("cpu")
        if options.cap:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(options.cap * 2**30 / total)
        started = time.perf_counter()
        model = build_random_4bit(
            MODELS[options.model], device, streamed_blocks=options.streamed, on_cards=options.sharded
        )
        build_s = time.perf_counter() - started
        setting = Setting(
            batch=options.batch,
            seq=options.seq,
            steps=options.steps,
            accumulation=2,
            checkpointing=CHECKPOINTING[options.ckpt],
            piece_bytes=2**60 if options.after else PIECE_BYTES,
        )
        measured = measure_speed(model, setting)
        exchange_ms = time_exchange(world, lay_side_by_side([parameter for _, parameter in iter_trainable(model)]))
        memory = world.gather([measured.pop("peak_reserved_GiB", None), round(peak_resident_bytes() / 2**30, 1)])
        if world.is_main:
            row = {"model": f"{options.model} shape", "ranks": world.size, "backend": world.backend}
            row |= {"cap_GiB": options.cap, "streamed_blocks": options.streamed, "sharded": options.sharded}
            row |= {
                "gradients": "after the backward" if options.after else "beside the backward",
                "build_s": round(build_s, 1),
            }
            row |= measured | {"exchange_ms": exchange_ms, "reserved_GiB_and_rss_GiB_by_rank": memory}
            print(json.dumps(row), flush=True)


def time_exchange(world: World, tensors: list[torch.Tensor]) -> float:
    """Return the median milliseconds of adding up tensors of all ranks, with nothing else going on."""
    times = []
    for _ in range(ROUNDS):
        world.wait()
        _finish(tensors[0].device)
        started = time.perf_counter()
        world.add_(tensors)
        _finish(tensors[0].device)
        times.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(times), 2)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
