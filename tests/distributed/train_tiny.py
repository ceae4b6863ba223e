"""Tiny trainings by one rank or several; the tests start several of this program.

torchrun --nproc-per-node=2 tests/distributed/train_tiny.py OUT.pt SCENARIO ...
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.distributed import ALONE, World, current_world, join_world
from halfbyte.models.streaming import stream_blocks_
from halfbyte.nn import Linear4bit
from halfbyte.train import HalfbyteTrainer
from tests.train.runs import build_examples, build_model, build_trainer, logged, trained_values

# Micro-batches of a step over all ranks.
TURNS = 4
CPU = torch.device("cpu")
# Steps of padded batches of two that come out even, of batches that leave some ranks with nothing, and packed rows.
SCENARIOS: dict[str, dict[str, Any]] = {
    "even": {"count": 32, "row_tokens": None},
    "uneven": {"count": 25, "row_tokens": None},
    "grouped": {"count": 25, "row_tokens": None, "train_sampling_strategy": "group_by_length"},
    "packed": {"count": 40, "row_tokens": 32, "neftune_noise_alpha": 5.0},
    "whole state": {"count": 21, "row_tokens": 32, "optim": "adamw_torch"},
    # Gradients sent while others are computed; and where memory runs out meanwhile.
    "in pieces": {"count": 32, "row_tokens": None},
    "begun anew": {"count": 40, "row_tokens": 32},
    # Frozen weights in memory that the ranks share, or in one file.
    "streamed": {"count": 16, "row_tokens": 32, "num_train_epochs": 1, "streamed_blocks": 2},
    # Divided among the ranks, which read them from each other; with four of them, two have no share.
    "sharded": {"count": 25, "row_tokens": 32, "num_train_epochs": 1, "streamed_blocks": 2, "on_cards": True},
    # The first rank alone, as it does where memory runs out.
    "relieved": {"count": 16, "row_tokens": 32, "num_train_epochs": 1, "streamed_blocks": 2, "by_one_rank": True},
    "in files": {"count": 16, "row_tokens": 32, "num_train_epochs": 1, "streamed_blocks": 2, "spills": True},
}


def make_trainer(name: str, folder: Path, world: World, **others: Any) -> HalfbyteTrainer:
    """Return the trainer of a scenario, the turns of a step shared out over the ranks."""
    options = {**SCENARIOS[name], **others}
    model = build_model()
    if count := options.pop("streamed_blocks", 0):
        folder.mkdir(parents=True)
        spill_folder = folder if options.pop("spills", False) else None
        on_cards = options.pop("on_cards", False)
        others: dict[str, Any] = {"num_slots": 2, "spill_folder": spill_folder, "on_cards": on_cards}
        if not options.pop("by_one_rank", False):
            stream_blocks_(model, count, device=CPU, **others)
        elif world.is_main:
            stream_blocks_(model, count, device=CPU, **others, world=ALONE)
    return build_trainer(
        folder,
        model=model,
        examples=build_examples(options.pop("count")),
        eval_dataset=build_examples(7, seed=5),
        gradient_accumulation_steps=TURNS // world.size,
        **{"num_train_epochs": 2, **options},
    )


def watch_exchange(trainer: HalfbyteTrainer, *, runs_out: bool) -> list[int]:
    """Return how many pieces of gradients will be on their way as the first block's are computed, one micro-batch each.

    Args:
        trainer: Before its training. Its pieces are made small.
        runs_out: Let memory run out there, once.
    """
    runner = trainer.micro_batches
    runner.exchange.piece_bytes = 2**9
    sent: list[int] = []

    def see(parameter: torch.Tensor) -> None:
        sent.append(len(runner.exchange._waits))
        # The last micro-batch of a step, of two ranks or four.
        if runs_out and len(sent) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    runner.parameters[0].register_post_accumulate_grad_hook(see)
    return sent


def outcome_of(trainer: HalfbyteTrainer) -> dict[str, Any]:
    """Return what a training came to."""
    return {
        "values": trained_values(trainer.model),
        "loss": logged(trainer),
        "grad_norm": logged(trainer, "grad_norm"),
        "held_out": trainer.measure().loss,
        "visiting": current_world().gather(sum(module.lives_elsewhere for module in iter_linears(trainer.model))),
        "shared": [inode for inode in current_world().gather(shared_inodes()) if inode],
    }


def iter_linears(model: nn.Module) -> Iterator[Linear4bit]:
    """Yield the 4-bit layers of a model."""
    return (module for module in model.modules() if isinstance(module, Linear4bit))


def shared_inodes() -> list[str]:
    """Return which memory made to be shared this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[4] for line in lines if "halfbyte-weights" in line})


def run_scenario(name: str, folder: Path) -> dict[str, Any]:
    """Train as a scenario says, and return what came out."""
    world = current_world()
    trainer = make_trainer(name, folder, world)
    sent: list[int] = []
    if name in ("in pieces", "begun anew"):
        sent = watch_exchange(trainer, runs_out=name == "begun anew" and world.size > 1 and world.is_main)
    trainer.train()
    return {**outcome_of(trainer), "sent": sent, "notes": trainer.notes}


def main() -> None:
    out, *names = sys.argv[1:]
    with join_world(on_cpu=True) as world, tempfile.TemporaryDirectory() as folder:
        results = {name: run_scenario(name, Path(folder) / str(index)) for index, name in enumerate(names)}
        if world.is_main:
            torch.save(results, out)


if __name__ == "__main__":
    main()
