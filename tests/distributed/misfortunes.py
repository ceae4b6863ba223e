"""Ranks that do not fit together, or of which one meets a number that no arithmetic survives; see test_misfortunes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from halfbyte.distributed import World, join_world
from halfbyte.errors import HalfbyteError
from halfbyte.train import HalfbyteTrainer
from tests.train.runs import build_examples, build_trainer


def with_other_data(folder: Path, world: World) -> HalfbyteTrainer:
    return build_trainer(folder, examples=build_examples(8 + world.rank), max_steps=2)


def with_other_seed(folder: Path, world: World) -> HalfbyteTrainer:
    return build_trainer(folder, max_steps=2, seed=world.rank)


def with_a_poisoned_rank(folder: Path, world: World) -> HalfbyteTrainer:
    trainer = build_trainer(folder, examples=build_examples(8), max_steps=2, row_tokens=None)
    if world.rank == 1:
        with torch.no_grad():
            trainer.model.get_output_embeddings().weight[0, 0] = float("nan")
    return trainer


def main() -> None:
    with join_world(on_cpu=True) as world:
        for misfortune in (with_other_data, with_other_seed, with_a_poisoned_rank):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    misfortune(Path(folder), world).train()
                except HalfbyteError as error:
                    saved = sorted(path.name for path in Path(folder).glob("adapter_model*"))
                    lines = [f"{misfortune.__name__} rank {world.rank} {type(error).__name__} {saved}: {error}\n"]
                    sys.stdout.writelines(lines)
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
