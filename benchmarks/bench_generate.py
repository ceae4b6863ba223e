"""Decoding at batch 1: the base in 4 bits, with its adapter unmerged, and transformers' own generate() beside it.

A random model of SmolLM2-135M's shape on a CPU, of Llama-7B's on a GPU; a prompt of 64 tokens, then NEW_TOKENS
without stopping. `tokens_per_s` is the median of the steps after the first, which reads the prompt and is
`prefill_ms`. On a CPU 4-bit weights are kept expanded while generating, for transformers' loop as well; `expand_ms`
is what that takes once.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from benchmarks.bench_train import LLAMA_7B, SMOLLM2_135M, build_random_model
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.nn import LoraSpec, adapters_disabled, attach_adapters

PROMPT_TOKENS, NEW_TOKENS = 64, 33


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield one measurement for base and adapter each, and the same through transformers."""
    on_gpu = device.type == "cuda"
    model = build_random_model(LLAMA_7B if on_gpu else SMOLLM2_135M, device)
    attach_adapters(model, LoraSpec(seed=0))
    prompt = list(range(4, 4 + PROMPT_TOKENS))
    for name in ("base", "adapter"):
        with adapters_disabled(model) if name == "base" else contextlib.nullcontext():
            started = time.perf_counter()
            with inference_state(model):
                expanding = time.perf_counter() - started
                decode(model, prompt, device)
                seconds = decode(model, prompt, device)
                library_seconds = generate(model, prompt, device)
        step = statistics.median(seconds[1:])
        yield {
            "model": "Llama-7B shape" if on_gpu else "SmolLM2-135M shape",
            "weights": name,
            "tokens_per_s": round(1 / step, 1),
            "prefill_ms": round(1e3 * seconds[0], 1),
            "expand_ms": round(1e3 * expanding, 1),
            "transformers_tokens_per_s": round(NEW_TOKENS / library_seconds, 1),
        }


def decode(model: PreTrainedModel, prompt: list[int], device: torch.device) -> list[float]:
    """Return the seconds of each step of our loop."""
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    times = [time.perf_counter()]
    # Each step ends with its token on the host, which is the wait that a timer needs.
    for _ in iter_tokens(model, [prompt], options=options, stop_ids=frozenset()):
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def generate(model: PreTrainedModel, prompt: list[int], device: torch.device) -> float:
    """Return the seconds that transformers' generate() takes for the same."""
    ids = torch.tensor([prompt], device=device)
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - started
