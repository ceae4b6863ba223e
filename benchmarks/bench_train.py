"""Training steps through the trainer that people use, not through a loop of the benchmark's own.

    python -m benchmarks.bench_train --model DIR --blocks blocks.npz --out X.json --steps 30
    python -m benchmarks.bench_train --model DIR --batch 4 --seq 1024 --steps 12 --ckpt 1 --device cuda

The first form trains on fixed blocks of tokens (an .npz with int32 arrays `train` and `eval`, one row a block), block
4 i to 4 i + 3 at step i, and writes loss and seconds of every step, held-out loss before and after, and peak memory.
The second trains on random tokens, an optimizer step every second micro-batch, and prints one JSON line: speed and
memory only. `rows` does the second on a random model of SmolLM2-135M's shape (CPU) or Llama-7B's (GPU).

Settings are the usual recipe's: rank 16, alpha 32, dropout 0.05 on all projections, NF4 with double quantisation,
8-bit AdamW at 2e-4 with cosine decay after 3% of warmup, gradients clipped to 0.3.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainerCallback

from halfbyte.data import TokenizedExample
from halfbyte.device import default_compute_dtype, default_device, keep_freed_memory, peak_resident_bytes
from halfbyte.distributed import current_world
from halfbyte.distributed.world import PIECE_BYTES
from halfbyte.memory.activation_policy import Policy
from halfbyte.models import load_model
from halfbyte.models.attention import PACKED_ATTENTION, register_packed_attention
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.nn import LoraSpec, attach_adapters, quantize_linears_
from halfbyte.ops.e4m3 import why_no_fp8
from halfbyte.quant import QuantSpec
from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

CHECKPOINTING: dict[str, bool | str] = {"0": False, "1": True, "auto": "auto", "offload": "offload"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how."""

    batch: int
    seq: int
    steps: int
    accumulation: int = 1
    checkpointing: bool | str = False
    dropout: float = 0.05
    optim: str = "paged_adamw_8bit"
    warmup_steps: float = 0.03
    fused: bool = True
    fp8: bool = False
    policies: tuple[Policy, ...] | None = None
    piece_bytes: int = PIECE_BYTES
    """By which ranks send each other gradients."""


class StepTimer(TrainerCallback):
    """Takes the time and the loss of every optimizer step.

    On a GPU by events in its stream: waiting for the device after every step would be what training does not do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.losses: list[float] = []
        self._marks: list[Any] = []

    @property
    def seconds(self) -> list[float]:
        """Of every step."""
        pairs = itertools.pairwise(self._marks)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._mark()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._mark()

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def _mark(self) -> None:
        if self.device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield the speed of training on random tokens, with activations kept and with activations computed again."""
    on_gpu = device.type == "cuda"
    setting = Setting(batch=4, seq=1024, steps=8, accumulation=2) if on_gpu else Setting(batch=4, seq=512, steps=4)
    shape = LLAMA_7B if on_gpu else SMOLLM2_135M
    variants: list[tuple[bool, bool | str, float]] = [(True, False, 0.0), (True, False, 0.05), (True, True, 0.05)]
    variants += [(True, "offload", 0.05)] if on_gpu else []
    variants += [(False, False, 0.05), (False, True, 0.05)]
    settings = [
        dataclasses.replace(setting, fused=fused, checkpointing=checkpointing, dropout=dropout)
        for fused, checkpointing, dropout in variants
    ]
    if why_no_fp8(device) is None:
        settings += [dataclasses.replace(setting, fp8=True), dataclasses.replace(setting, fp8=True, checkpointing=True)]
    for one in settings:
        model = build_random_model(shape, device)
        yield {"model": "Llama-7B shape" if on_gpu else "SmolLM2-135M shape"} | measure_speed(model, one)
        del model
        gc.collect()


def build_random_model(shape: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """Return a random model in 4 bits."""
    register_packed_attention()
    with device:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**shape), dtype=default_compute_dtype(device), attn_implementation=PACKED_ATTENTION
        )
        quantize_linears_(model, QuantSpec())
    return model


def measure_speed(model: PreTrainedModel, setting: Setting) -> dict[str, object]:
    """Train on random tokens and return tokens a second and peak memory."""
    attach_adapters(model, LoraSpec(dropout=setting.dropout, seed=0))
    device = compute_device_of(model)
    vocabulary = model.config.vocab_size
    generator = np.random.default_rng(0)
    ranks = current_world().size
    num_rows = setting.batch * setting.accumulation * setting.steps * ranks
    blocks = generator.integers(4, vocabulary, (num_rows, setting.seq))
    reset_peak(device)
    trainer, timer = train(model, blocks, setting)
    relieved = [note for note in trainer.notes if note.startswith("out of memory")]
    # The first two steps make state, grow buffers and choose kernels.
    steady = timer.seconds[2:] if len(timer.seconds) > 3 else timer.seconds
    tokens = setting.batch * setting.seq * setting.accumulation * ranks
    memory: dict[str, object] = {"peak_rss_mib": round(peak_resident_bytes() / 2**20)}
    if device.type == "cuda":
        memory = {
            "peak_alloc_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "peak_reserved_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
    return {
        "batch": setting.batch,
        "seq": setting.seq,
        "dropout": setting.dropout,
        "fused": setting.fused,
        "fp8": setting.fp8,
        "ckpt": next(name for name, value in CHECKPOINTING.items() if value is setting.checkpointing),
        "dtype": str(default_compute_dtype(device)).removeprefix("torch."),
        "step_ms": round(1e3 * statistics.median(steady) / setting.accumulation, 1),
        "tok_s": round(tokens / statistics.mean(steady), 1),
        "loss": round(timer.losses[-1], 4),
        **({"ranks": ranks} if ranks > 1 else {}),
        **memory,
        **({"relieved": relieved} if relieved else {}),
    }


def train(model: PreTrainedModel, blocks: np.ndarray, setting: Setting) -> tuple[HalfbyteTrainer, StepTimer]:
    """Train on blocks in their order, one a row, all tokens but the first of a row being targets."""
    device = compute_device_of(model)
    timer = StepTimer(device)
    with tempfile.TemporaryDirectory() as folder:
        args = HalfbyteArguments(
            folder,
            max_steps=setting.steps,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=setting.accumulation,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=setting.warmup_steps,
            max_grad_norm=0.3,
            optim=setting.optim,
            gradient_checkpointing=setting.checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            use_cpu=device.type == "cpu",
            seed=0,
        )
        trainer = HalfbyteTrainer(
            model,
            args,
            train_dataset=to_examples(blocks),
            callbacks=[timer],
            options=TrainerOptions(
                row_tokens=setting.seq, fused=setting.fused, fp8=setting.fp8, policies=setting.policies
            ),
        )
        trainer.micro_batches.exchange.piece_bytes = setting.piece_bytes
        trainer.train()
    return trainer, timer


def train_on_blocks(options: argparse.Namespace) -> dict[str, object]:
    """Train on the fixed blocks and return everything that is compared with other systems."""
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    started = time.perf_counter()
    loaded = load_model(options.model, quant=QuantSpec(), device=device, attn_implementation=PACKED_ATTENTION)
    phases = {"load_s": time.perf_counter() - started}
    model = loaded.model
    attach_adapters(model, LoraSpec(dropout=options.dropout, seed=0))
    stored = np.load(options.blocks)
    blocks, held_out = stored["train"], stored["eval"]
    seq = blocks.shape[1]
    setting = Setting(
        batch=options.batch,
        seq=seq,
        steps=options.steps,
        checkpointing=CHECKPOINTING[options.ckpt],
        dropout=options.dropout,
        fused=not options.generic,
        fp8=options.fp8,
    )
    before = measure_blocks(model, held_out)
    reset_peak(device)
    started = time.perf_counter()
    trainer, timer = train(model, blocks[: options.steps * options.batch], setting)
    total = time.perf_counter() - started
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else peak_resident_bytes()
    steady = timer.seconds[2:] if len(timer.seconds) > 3 else timer.seconds
    return {
        "system": "halfbyte",
        "config": dataclasses.asdict(setting),
        "compute_dtype": str(loaded.report.compute_dtype).removeprefix("torch."),
        "notes": trainer.notes,
        "tokens_per_step": options.batch * seq,
        "steps": len(timer.seconds),
        "train_total_s": total,
        "tokens_per_s_median": options.batch * seq / statistics.median(steady),
        "train_peak_rss_mib": peak / 2**20,
        "phases": phases,
        "loss": timer.losses,
        "step_seconds": timer.seconds,
        "held_out_loss": {"before": before, "after": measure_blocks(model, held_out)},
        "threads": torch.get_num_threads(),
    }


def measure_blocks(model: PreTrainedModel, blocks: np.ndarray) -> float:
    """Return the mean next-token loss over blocks."""
    from halfbyte.train import BatchOptions, evaluate_loss, iter_batches

    options = BatchOptions(pad_id=0, row_tokens=blocks.shape[1])
    return evaluate_loss(model, iter_batches(to_examples(blocks), options, batch_size=4)).loss


def to_examples(blocks: np.ndarray) -> list[TokenizedExample]:
    """Return each block as an example all of whose tokens are learned."""
    learned = np.ones(blocks.shape[1], dtype=bool)
    return [TokenizedExample(block, learned, f"block {number}") for number, block in enumerate(blocks)]


def reset_peak(device: torch.device) -> None:
    """Start peak memory from what is held now, where the system allows it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--blocks", type=Path, help="fixed tokens; without it random ones")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: stdout")
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=1024, help="for random tokens")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps; for random tokens micro-batches")
    parser.add_argument("--ckpt", choices=tuple(CHECKPOINTING), default="0", help="compute activations again")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--generic", action="store_true", help="the path for any architecture")
    parser.add_argument("--fp8", action="store_true", help="fp8 products of the frozen weights")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.blocks is not None:
        result = train_on_blocks(options)
    else:
        device = torch.device(options.device)
        loaded = load_model(options.model, quant=QuantSpec(), device=device, attn_implementation=PACKED_ATTENTION)
        setting = Setting(
            batch=options.batch,
            seq=options.seq,
            steps=options.steps // 2,
            accumulation=2,
            checkpointing=CHECKPOINTING[options.ckpt],
            dropout=options.dropout,
            fused=not options.generic,
            fp8=options.fp8,
        )
        result = {"stack": "halfbyte", "load_s": round(loaded.report.seconds, 1)} | measure_speed(loaded.model, setting)
    text = json.dumps(result, indent=1 if options.out else None)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
