"""Peak memory of loading or merging a model, measured in a process of its own.

    python -m tests.models.measure_peak load MODEL
    python -m tests.models.measure_peak merge MODEL ADAPTER OUT

Prints the RssAnon above what the process had before, in bytes, as JSON. The same is done once before with a model as
small as possible, so that what libraries allocate once and for all does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.bench_load import PeakSampler
from halfbyte.device import resident_bytes
from halfbyte.export import merge_adapter
from halfbyte.models import load_model, save_adapter
from halfbyte.nn import LoraSpec, attach_adapters, iter_trainable
from halfbyte.quant import QuantSpec
from tests.models.tiny import SIZES, save_tiny

WIDE = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6}
# gate, up and down: 4096 x 512 in bf16.
LARGEST_TENSOR_BYTES = 4096 * 512 * 2


def save_wide(folder: Path) -> Path:
    """Write a model of 88 MB in many shards."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **WIDE}), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20MB")
    return folder


def save_random_adapter(base: Path, folder: Path) -> Path:
    """Write an adapter on every linear layer."""
    model, spec = load_model(base, quant=None, device="cpu").model, LoraSpec(rank=4, alpha=8)
    attach_adapters(model, spec)
    with torch.no_grad():
        for _, parameter in iter_trainable(model):
            parameter.normal_(0, 0.05)
    save_adapter(model, folder, base_model=str(base), spec=spec)
    return folder


def peak_bytes(*arguments: str | Path) -> dict[str, int]:
    """Run this file in a fresh process and return what it measured."""
    command = [sys.executable, "-m", "tests.models.measure_peak", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def measure(action: Callable[[], dict[str, int]]) -> dict[str, int]:
    before = resident_bytes()
    with PeakSampler() as sampler:
        result = action()
    return {"peak": sampler.peak_bytes - before, **result}


def load(model: Path) -> dict[str, int]:
    report = load_model(model, quant=QuantSpec(), compute_dtype="float32", device="cpu").report
    return {"held": report.bytes_4bit + report.bytes_16bit}


def merge(model: Path, adapter: Path, out: Path) -> dict[str, int]:
    merge_adapter(model, adapter, out)
    return {}


def main() -> None:
    name, *paths = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        tiny = save_tiny(Path(scratch) / "tiny")
        if name == "load":
            load(tiny)
            print(json.dumps(measure(lambda: load(Path(paths[0])))))
        else:
            merge(tiny, save_random_adapter(tiny, Path(scratch) / "adapter"), Path(scratch) / "out")
            print(json.dumps(measure(lambda: merge(*map(Path, paths)))))


if __name__ == "__main__":
    main()
