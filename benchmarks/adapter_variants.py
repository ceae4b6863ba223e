"""What LoRA's variants cost and reach on one model and one file: loss, seconds a step, memory, time to load.

    python -m benchmarks.adapter_variants MODEL DATA [--steps 30] [--rows 4] [--row-tokens 256] [--out X.json]

Each variant trains in a process of its own, so that peaks of memory are its own, on the same rows in the same order,
with the same seed, rate and dropout. Held-out losses are over the same examples: of the base in 4 bits before, and with
the adapter after; `begins_at` is with the adapter before the first step, which for PiSSA and LoftQ is the base and what
their adapters already put right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bench_train import StepTimer
from halfbyte.config import DataSection, LoraSection, ModelSection, RunConfig, TrainSection
from halfbyte.device import describe_machine, keep_freed_memory, peak_resident_bytes
from halfbyte.nn import adapters_disabled
from halfbyte.train.setup import attach, build_arguments, load_base, load_data
from halfbyte.train.trainer import HalfbyteTrainer, TrainerOptions

VARIANTS: dict[str, dict[str, object]] = {
    "LoRA": {},
    "LoRA, path for any architecture": {"fused": False},
    "DoRA": {"dora": True},
    "DoRA, no dropout": {"dora": True, "dropout": 0.0},
    "PiSSA, 16 rounds on a subspace": {"init": "pissa_niter_16"},
    "LoftQ, 1 round": {"init": "loftq"},
    "PiSSA": {"init": "pissa"},
    "LoftQ, 5 rounds": {"init": "loftq", "loftq_iterations": 5},
}


def make_config(options: argparse.Namespace, folder: str, variant: dict[str, object]) -> RunConfig:
    fused = bool(variant.get("fused", True))
    lora = {name: value for name, value in variant.items() if name != "fused"}
    return RunConfig(
        model=ModelSection(path=options.model),
        data=DataSection(train=options.data, max_length=options.row_tokens, held_out_fraction=options.held_out),
        lora=LoraSection(**lora),  # type: ignore[arg-type]
        train=TrainSection(
            max_steps=options.steps,
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            learning_rate=options.learning_rate,
            fused=fused,
        ),
        output_dir=folder,
    )


def measure(options: argparse.Namespace, name: str) -> dict[str, object]:
    """Train one variant in this process."""
    keep_freed_memory()
    console = Console(file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(options, folder, VARIANTS[name])
        loaded = load_base(config, console)
        data = load_data(config, loaded.tokenizer, console)
        spec, report = attach(loaded, config)
        timer = StepTimer(loaded.report.device)
        on_cpu = loaded.report.device.type == "cpu"
        trainer = HalfbyteTrainer(
            loaded.model,
            build_arguments(config, on_cpu=on_cpu, has_held_out=False),
            train_dataset=data.train.examples,
            eval_dataset=None if data.held_out is None else data.held_out.examples,
            callbacks=[timer],
            options=TrainerOptions(
                row_tokens=options.row_tokens, base_model=options.model, lora=spec, fused=config.train.fused
            ),
        )
        with adapters_disabled(loaded.model):
            before = trainer.measure().loss
        begins_at = trainer.measure().loss
        started = time.process_time()
        trainer.train()
        cpu_seconds = time.process_time() - started
        return {
            "variant": name,
            "held_out_base": round(before, 4),
            "begins_at": round(begins_at, 4),
            "held_out": round(trainer.measure().loss, 4),
            "step_seconds_median": round(statistics.median(timer.seconds), 2),
            # On a machine that others share, what tells more.
            "step_cpu_seconds": round(cpu_seconds / options.steps, 2),
            "load_seconds": round(loaded.report.seconds, 1),
            "peak_mib": round((peak_resident_bytes() if on_cpu else torch.cuda.max_memory_reserved()) / 2**20),
            "trained": report.trainable_parameters,
            "notes": list(trainer.notes),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the data")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--variant", help="only this one, in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.variant is not None:
        print(json.dumps(measure(options, options.variant)))
        return
    rows = []
    for name in VARIANTS:
        arguments = [sys.executable, "-m", "benchmarks.adapter_variants", *sys.argv[1:], "--variant", name]
        output = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
        if options.out is not None:
            settings = {key: value for key, value in vars(options).items() if key not in ("out", "variant")}
            record = {"machine": str(describe_machine()), "threads": torch.get_num_threads(), **settings}
            options.out.write_text(json.dumps({**record, "bench": "adapter_variants", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
