"""Training steps of large models on little device memory: weights visit from host memory, activations are put away.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python -m benchmarks.run --only memory
    python -m benchmarks.bench_memory --model Llama-65B --cap 8 --streamed 80

Random 4-bit weights; settings as in `bench_train`: rank 16 on all projections, NF4 with double quantisation, 8-bit
AdamW with its state in host memory, 4 x 1024 tokens a micro-batch, an optimizer step every second one, dropout 0.05.
`cap` is what the allocator may reserve, and it enforces that. On a GPU only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.bench_shapes import SHAPES
from benchmarks.bench_train import CHECKPOINTING, Setting, measure_speed
from benchmarks.random_model import build_random_4bit
from halfbyte.device import peak_resident_bytes


def _llama(width: int, ff_width: int, layers: int, heads: int) -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": ff_width, "num_hidden_layers": layers}
    return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=32000)


MODELS = SHAPES | {"Llama-13B": _llama(5120, 13824, 40, 40), "Llama-65B": _llama(8192, 22016, 80, 64)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained under which cap."""

    model: str
    cap_gib: float
    streamed_blocks: int
    spill_folder: Path | None = None
    checkpointing: str = "offload"
    batch: int = 4
    seq: int = 1024
    steps: int = 4


CASES = (
    Case(model="Llama-7B", cap_gib=4, streamed_blocks=24),
    Case(model="Llama-13B", cap_gib=6, streamed_blocks=30),
    Case(model="Llama-65B", cap_gib=8, streamed_blocks=80),
    Case(model="Llama-65B", cap_gib=24, streamed_blocks=48),
)


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield the speed and memory of each case."""
    if device.type == "cuda":
        for case in CASES:
            yield measure(case, device)


def measure(case: Case, device: torch.device) -> dict[str, object]:
    """Train, and return speed and memory."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(case.cap_gib * 2**30 / total)
    started = time.perf_counter()
    model = build_random_4bit(
        MODELS[case.model], device, streamed_blocks=case.streamed_blocks, spill_folder=case.spill_folder
    )
    build_s = time.perf_counter() - started
    setting = Setting(
        batch=case.batch,
        seq=case.seq,
        steps=case.steps,
        accumulation=2,
        checkpointing=CHECKPOINTING[case.checkpointing],
    )
    try:
        return {
            "model": f"{case.model} shape",
            "cap_GiB": case.cap_gib,
            "streamed_blocks": case.streamed_blocks,
            "in_files": case.spill_folder is not None,
            "blocks": model.config.num_hidden_layers,
            "build_s": round(build_s, 1),
            **measure_speed(model, setting),
            "peak_rss_GiB": round(peak_resident_bytes() / 2**30, 1),
        }
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), required=True)
    parser.add_argument("--cap", type=float, required=True, help="GiB of device memory")
    parser.add_argument("--streamed", type=int, default=0, help="blocks whose weights live in host memory")
    parser.add_argument("--spill", type=Path, help="folder on whose disk they lie in files instead")
    parser.add_argument("--ckpt", choices=tuple(CHECKPOINTING), default="offload")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    case = Case(
        model=options.model,
        cap_gib=options.cap,
        streamed_blocks=options.streamed,
        spill_folder=options.spill,
        checkpointing=options.ckpt,
        batch=options.batch,
        seq=options.seq,
        steps=options.steps,
    )
    print(json.dumps(measure(case, torch.device("cuda"))), flush=True)


if __name__ == "__main__":
    main()
