"""The loss of a large vocabulary and its gradient: in chunks, and with whole logits.

Hidden states and head in the compute dtype that halfbyte chooses on this machine, the head frozen. On a CPU the head
of SmolLM2-135M (49,152 words, width 576) with 2048 tokens, on a GPU those of a Llama-2-7B (32,000 words) and of a
Llama-3-8B (128,256), width 4096, with 4096 tokens. `ms` is the median of a forward and a backward; `peak_mib` (GPU) is
what they allocate on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from benchmarks.bench_lora_linear import time_calls
from halfbyte.device import default_compute_dtype
from halfbyte.ops.cross_entropy import chunked_cross_entropy, cross_entropy_reference

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Tokens, width, vocabulary.
CPU_SIZES = [(2048, 576, 49_152)]
GPU_SIZES = [(4096, 4096, 32_000), (4096, 4096, 128_256)]


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield one measurement for each head, share of trained tokens and implementation."""
    dtype = default_compute_dtype(device)
    for tokens, width, words in GPU_SIZES if device.type == "cuda" else CPU_SIZES:
        hidden = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(words, width, device=device, dtype=dtype) * width**-0.5
        for share in (1.0, 0.3):
            labels = torch.randint(0, words, (tokens,), device=device)
            labels[torch.rand(tokens, device=device) >= share] = -100
            for name, loss in implementations(device):
                milliseconds, peak_mib = measure(loss, hidden, weight, labels)
                yield {
                    "loss": name,
                    "trained": share,
                    "tokens": tokens,
                    "words": words,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": round(milliseconds, 2),
                    "peak_mib": peak_mib,
                }


def implementations(device: torch.device) -> Iterator[tuple[str, Loss]]:
    """Yield name and function of each way to the loss."""
    is_gpu = device.type == "cuda"
    for backend in ("triton", "torch") if is_gpu else ("torch",):
        chunked = functools.partial(chunked_cross_entropy, backend=backend)
        yield f"chunked, {backend}", chunked
        for chunk_tokens in (1024, 4096) if is_gpu else (64, 128, 256, 512):
            yield f"chunks of {chunk_tokens}, {backend}", functools.partial(chunked, chunk_tokens=chunk_tokens)
    yield "whole logits", cross_entropy_reference


def measure(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[float, float | None]:
    """Return milliseconds and, on a GPU, the MiB allocated above what was there."""

    def step() -> None:
        loss(hidden, weight, labels).backward()
        hidden.grad = None

    if hidden.device.type != "cuda":
        return time_calls(step, hidden.device, repeats=5), None
    torch.cuda.reset_peak_memory_stats(hidden.device)
    before = torch.cuda.memory_allocated(hidden.device)
    milliseconds = time_calls(step, hidden.device, repeats=15)
    return milliseconds, round((torch.cuda.max_memory_allocated(hidden.device) - before) / 2**20, 1)
