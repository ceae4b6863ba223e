"""What a checkpoint costs the loop: copying the state out, against writing it, which a thread does.

    python -m benchmarks.run --only save

Random 4-bit weights in the shape of SmolLM2-135M, adapters of rank 16 and 64 on all projections, state of one step.
`copy_ms` is what training stands still for; `write_ms` is serialising, checksums, fsync and rename, beside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_memory import MODELS
from benchmarks.random_model import build_random_4bit
from halfbyte.data.examples import TokenizedExample
from halfbyte.nn import LoraSpec, attach_adapters
from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions
from halfbyte.train.checkpoint import write_folder
from halfbyte.train.snapshot import TokenizerFiles, take_snapshot

MODEL, ROW_TOKENS, ROUNDS = "SmolLM2-135M", 256, 7


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield both ranks with 8-bit and 32-bit state."""
    for rank in (16, 64):
        for optim in ("adamw_8bit", "adamw_torch"):
            with tempfile.TemporaryDirectory() as name:
                yield {"model": MODEL, "rank": rank, "optim": optim, **measure(Path(name), rank, optim, device)}


def measure(folder: Path, rank: int, optim: str, device: torch.device) -> dict[str, object]:
    """Train two steps, then copy and write the state some times."""
    spec = LoraSpec(rank=rank, alpha=2 * rank, dropout=0.0, seed=0)
    model = build_random_4bit(MODELS[MODEL], device)
    attach_adapters(model, spec)
    ids = np.arange(ROW_TOKENS) + 5
    examples = [TokenizedExample(ids, np.ones(ROW_TOKENS, dtype=bool), f"row:{number}") for number in range(4)]
    arguments = HalfbyteArguments(
        str(folder / "out"),
        max_steps=2,
        per_device_train_batch_size=1,
        optim=optim,
        save_strategy="no",
        report_to="none",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    options = TrainerOptions(row_tokens=ROW_TOKENS, base_model=MODEL, lora=spec)
    trainer = HalfbyteTrainer(model, arguments, train_dataset=examples, options=options)
    trainer.train()
    snapshot = take_snapshot(trainer, run_state={}, config_text=None)

    def write() -> None:
        with write_folder(folder / "checkpoint-2") as temporary:
            snapshot.write(temporary, TokenizerFiles(None))

    copy_ms = median_ms(lambda: take_snapshot(trainer, run_state={}, config_text=None))
    write_ms = median_ms(write)
    num_bytes = sum(path.stat().st_size for path in (folder / "checkpoint-2").iterdir())
    return {"mib": round(num_bytes / 2**20, 1), "copy_ms": round(copy_ms, 1), "write_ms": round(write_ms, 1)}


def median_ms(call: Callable[[], object]) -> float:
    """Return the median of some rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3
