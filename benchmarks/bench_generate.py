"""Decoding at batch 1: the base in 4 bits, with its adapter unmerged, and transformers' own generate() beside it.

    python -m benchmarks.bench_generate --profile trace.json          (a GPU: where a step's time goes)
    python -m benchmarks.bench_generate --profile trace.json --eager  (without a graph; or --overlap, --no-overlap)

A random model of SmolLM2-135M's shape on a CPU, of Llama-7B's on a GPU; a prompt of 64 tokens, then so many new ones
without stopping. `tokens_per_s` counts one prompt's tokens: it is the median of the steps after the first two, of
which the first reads the prompt and is `prefill_ms`. The first answer makes a decoder, which expands the weights on a
CPU and records a graph on a GPU: `prepare_ms` is what it takes longer than the second. transformers' loop restores the
weights for each token. On a GPU there are rows for four prompts at once.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

from benchmarks.bench_train import LLAMA_7B, SMOLLM2_135M, build_random_model
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.models.static_decoder import StaticDecoder
from halfbyte.nn import LoraSpec, adapters_disabled, attach_adapters

PROMPT_TOKENS = 64
NEW_TOKENS_ON_CPU, NEW_TOKENS_ON_GPU = 33, 128
LIBRARY_TOKENS = 33
PROFILED_STEPS = 8


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield one measurement for base and adapter each, and the same through transformers."""
    on_gpu = device.type == "cuda"
    new_tokens = NEW_TOKENS_ON_GPU if on_gpu else NEW_TOKENS_ON_CPU
    model = build_model(device)
    prompt = list(range(4, 4 + PROMPT_TOKENS))
    for name, prompts in itertools.product(("base", "adapter"), (1, 4) if on_gpu else (1,)):
        with adapters_disabled(model) if name == "base" else contextlib.nullcontext(), inference_state(model):
            first = decode(model, [prompt] * prompts, new_tokens)
            seconds = decode(model, [prompt] * prompts, new_tokens)
            library_seconds = generate(model, prompt, device) if prompts == 1 else None
        step = statistics.median(seconds[2:])
        row: dict[str, object] = {
            "model": "Llama-7B shape" if on_gpu else "SmolLM2-135M shape",
            "weights": name,
            "prompts": prompts,
            "tokens_per_s": round(1 / step, 1),
            "prefill_ms": round(1e3 * seconds[0], 1),
            "prepare_ms": round(1e3 * (sum(first) - sum(seconds)), 1),
        }
        if library_seconds is not None:
            row["transformers_tokens_per_s"] = round(LIBRARY_TOKENS / library_seconds, 1)
        yield row


def build_model(device: torch.device) -> PreTrainedModel:
    model = build_random_model(LLAMA_7B if device.type == "cuda" else SMOLLM2_135M, device)
    attach_adapters(model, LoraSpec(seed=0))
    return model


def decode(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Return the seconds of each step of our loop."""
    options = GenerationOptions(max_new_tokens=new_tokens)
    times = [time.perf_counter()]
    # Each step ends with its token on the host, which is the wait that a timer needs.
    for _ in iter_tokens(model, prompts, options=options, stop_ids=frozenset()):
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def generate(model: PreTrainedModel, prompt: list[int], device: torch.device) -> float:
    """Return the seconds that transformers' generate() takes for the same."""
    ids = torch.tensor([prompt], device=device)
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LIBRARY_TOKENS,
        min_new_tokens=LIBRARY_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - started


@torch.no_grad()
def profile_steps(model: PreTrainedModel, num_prompts: int, *, graph: bool, overlap: bool | None, trace: Path) -> None:
    """Print what the kernels of a step take, longest first, and write a trace for chrome://tracing."""
    ids = torch.arange(4, 4 + PROMPT_TOKENS, device="cuda").expand(num_prompts, -1)
    with inference_state(model):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        size = {"num_prompts": num_prompts, "num_tokens": PROMPT_TOKENS + NEW_TOKENS_ON_GPU}
        decoder = StaticDecoder(model, greedy=True, graph=graph, overlap=overlap, **size)
        decoder.fill(cache, [PROMPT_TOKENS] * num_prompts)
        for _ in range(PROFILED_STEPS):
            decoder.advance(lambda logits_BV: logits_BV.argmax(-1))
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED_STEPS):
                decoder.advance(lambda logits_BV: logits_BV.argmax(-1))
            torch.cuda.synchronize()
        decoder.close()
    profiler.export_chrome_trace(str(trace))
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    counts = collections.Counter(event.name for event in kernels)
    microseconds: collections.Counter[str] = collections.Counter()
    for event in kernels:
        microseconds[event.name] += event.time_range.elapsed_us()
    span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
    print(f"{span / PROFILED_STEPS:9.1f} us a step from first to last, {len(kernels) / PROFILED_STEPS:.0f} kernels")
    for kernel, total in microseconds.most_common():
        count = counts[kernel]
        print(f"{total / PROFILED_STEPS:9.1f} us {count / PROFILED_STEPS:6.0f} x {total / count:6.2f}  {kernel[:90]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True, help="where the trace goes")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without a graph")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, help="let kernels overlap, or not")
    parser.add_argument("--base", action="store_true", help="without the adapter")
    options = parser.parse_args()
    model = build_model(torch.device("cuda"))
    with adapters_disabled(model) if options.base else contextlib.nullcontext():
        how = {"graph": not options.eager, "overlap": options.overlap}
        profile_steps(model, options.prompts, **how, trace=options.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
