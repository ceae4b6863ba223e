"""Loading and quantising a model, from files in the page cache to a model ready for use.

The checkpoint has random weights and is made here, in a temporary folder: the shape of SmolLM2-135M on a CPU, that of
Llama-7B (13.5 GB of bf16 in shards) on a GPU. Each measurement is a fresh process that imports everything and wakes the
device before the clock starts; `first` pays for compiling kernels where Triton has not cached them, `again` is the same
call once more. Memory: RssAnon above what the process had before, the peak of samples taken every two milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from halfbyte.device import resident_bytes
from halfbyte.export.shards import ShardWriter
from halfbyte.models import load_model
from halfbyte.quant import QuantSpec

SAMPLE_SECONDS = 0.002


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-shaped model."""

    name: str
    width: int
    kv_width: int
    feed_forward: int
    num_layers: int
    num_heads: int
    vocabulary: int
    is_tied: bool


SMALL = Shape("135M", 576, 192, 1536, 30, 9, 49152, True)
LARGE = Shape("7B", 4096, 4096, 11008, 32, 32, 32000, False)


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield one measurement: the first load of a process, and the same again."""
    shape = LARGE if device.type == "cuda" else SMALL
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_checkpoint(Path(folder), shape, device)
        command = [sys.executable, "-m", "benchmarks.bench_load", folder, str(device)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        measured = json.loads(done.stdout.splitlines()[-1])
    yield {"model": shape.name, "checkpoint_gb": round(num_bytes / 1e9, 3), **measured}


def measure(folder: str, device: torch.device) -> dict[str, object]:
    """Load twice in this process, and say how long it took and what memory it needed."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - imports are not what is measured

    if device.type == "cuda":
        torch.zeros(1, device=device)
    result: dict[str, object] = {}
    for when in ("first", "again"):
        before = resident_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with PeakSampler() as sampler:
            started = time.perf_counter()
            loaded = load_model(folder, quant=QuantSpec(), device=device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
        num_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        result[f"{when}_seconds"] = round(seconds, 3)
        result[f"{when}_gb_per_second"] = round(num_bytes / seconds / 1e9, 2)
        result[f"{when}_host_peak_mib"] = round((sampler.peak_bytes - before) / 2**20, 1)
        if device.type == "cuda":
            result[f"{when}_device_peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
            result["device_after_gib"] = round(torch.cuda.memory_allocated(device) / 2**30, 2)
        del loaded
    return result


class PeakSampler:
    """Watches this process's memory from a thread."""

    def __enter__(self) -> PeakSampler:
        self.peak_bytes = resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def write_checkpoint(folder: Path, shape: Shape, device: torch.device) -> int:
    """Write random weights under the names of a Llama model, and return their bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads * shape.kv_width // shape.width,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape.is_tied,
    }
    (folder / "config.json").write_text(json.dumps(config))
    sizes = dict(_parameters(shape))
    generator = torch.Generator(device).manual_seed(0)
    writer = ShardWriter(folder, sizes, max_shard_bytes=2_000_000_000)
    for name, size in sizes.items():
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        writer.add(name, values.normal_(0, 0.02, generator=generator) if len(size) == 2 else values.fill_(1))
    writer.close()
    return writer.total_bytes


def _parameters(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.width)
    for layer in range(shape.num_layers):
        path = f"model.layers.{layer}"
        yield f"{path}.self_attn.q_proj.weight", (shape.width, shape.width)
        yield f"{path}.self_attn.k_proj.weight", (shape.kv_width, shape.width)
        yield f"{path}.self_attn.v_proj.weight", (shape.kv_width, shape.width)
        yield f"{path}.self_attn.o_proj.weight", (shape.width, shape.width)
        yield f"{path}.mlp.gate_proj.weight", (shape.feed_forward, shape.width)
        yield f"{path}.mlp.up_proj.weight", (shape.feed_forward, shape.width)
        yield f"{path}.mlp.down_proj.weight", (shape.width, shape.feed_forward)
        yield f"{path}.input_layernorm.weight", (shape.width,)
        yield f"{path}.post_attention_layernorm.weight", (shape.width,)
    yield "model.norm.weight", (shape.width,)
    if not shape.is_tied:
        yield "lm_head.weight", (shape.vocabulary, shape.width)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], torch.device(sys.argv[2]))))
