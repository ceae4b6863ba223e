"""One of several ranks: what is shared out, what is compared, and what only the first does.

Micro-batches of an optimizer step are numbered over all ranks, n ranks taking n of them at a time; what is drawn at
random for one depends on that number and the run's seed alone. So n ranks compute what one computes with n times the
accumulation, but for the order of sums, and a run that is begun anew or resumed draws what it drew before.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from halfbyte.device import installed_version
from halfbyte.distributed import World
from halfbyte.train.meter import Meter, peak_memory_bytes

# Whose releases may differ in what they compute.
COMPARED_PACKAGES = ("halfbyte", "torch", "transformers", "tokenizers", "triton")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """How one rank has fared."""

    rank: int
    device: str
    num_tokens: int
    num_trained_tokens: int
    tokens_per_second: float
    trained_tokens_per_second: float
    peak_memory_bytes: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: {self.tokens_per_second:,.0f} tokens/s, peak memory "
            f"{self.peak_memory_bytes / 2**30:.2f} GiB on {self.device}"
        )


def seed_of_micro_batch(seed: int, number: int) -> int:
    """Return what torch's generators are seeded with for a micro-batch.

    Args:
        seed: Of the run.
        number: Of the micro-batch, over all steps and ranks.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/micro-batch/{number}".encode()).digest()[:7], "little")


def agree_on_run(world: World, facts: Mapping[str, Any]) -> None:
    """Make sure that all ranks are about to do the same.

    Args:
        world: The ranks.
        facts: Of the run: data, batch sizes, seeds.

    Raises:
        WorldError: They are not; the message names what differs.
    """
    versions = {f"the version of {name}": installed_version(name) for name in COMPARED_PACKAGES}
    world.agree({**versions, **facts})


def report_ranks(world: World, meter: Meter) -> list[RankReport]:
    """Return every rank's speed and memory; all ranks must ask."""
    device = meter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    mine = {
        "rank": world.rank,
        "device": name,
        "num_tokens": meter.num_tokens,
        "num_trained_tokens": meter.num_trained_tokens,
        "tokens_per_second": meter.tokens_per_second,
        "trained_tokens_per_second": meter.trained_tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    return [RankReport(**one) for one in world.gather(mine)]
