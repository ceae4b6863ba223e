"""One optimizer step on adapters: ours, bitsandbytes' and torch's.

On a CPU the adapters of SmolLM2-135M (rank 16 on all projections, 4.9 M parameters in 420 tensors), on a GPU those of
a Llama-7B (40 M in 448). Gradients alternate between two sets of tensors, as they do where a training loop frees
them: the addresses that the kernel is told change at every step.

`ms` is the time of a whole step, host and device, `host_ms` the time until `step()` returns; medians.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from halfbyte.optim import AdamW8bit, AdamW32bit

RANK = 16
Optimizer = Callable[..., torch.optim.Optimizer]


def adapter_shapes(*, layers: int, width: int, kv_width: int, feed_forward: int) -> list[tuple[int, int]]:
    """Return the shapes of lora_A and lora_B of all seven projections of all layers."""
    projections = [(width, width), (width, kv_width), (width, kv_width), (width, width)]
    projections += [(width, feed_forward), (width, feed_forward), (feed_forward, width)]
    return [shape for fan_in, fan_out in projections for shape in ((RANK, fan_in), (fan_out, RANK))] * layers


def contestants(device: torch.device) -> Iterator[tuple[str, Optimizer]]:
    """Yield name and constructor of each optimizer that this machine can run."""
    yield "halfbyte 8-bit", AdamW8bit
    yield "halfbyte 32-bit", AdamW32bit
    if device.type == "cuda":
        yield "halfbyte 8-bit paged", functools.partial(AdamW8bit, paged=True)
        yield "halfbyte 32-bit paged", functools.partial(AdamW32bit, paged=True)
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        yield "bitsandbytes 8-bit", bitsandbytes.optim.AdamW8bit
        if device.type == "cuda":
            yield "bitsandbytes 8-bit paged", bitsandbytes.optim.PagedAdamW8bit
    yield "torch fused 32-bit", functools.partial(torch.optim.AdamW, fused=True)


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield one measurement for each optimizer."""
    if device.type == "cuda":
        shapes = adapter_shapes(layers=32, width=4096, kv_width=4096, feed_forward=11008)
    else:
        shapes = adapter_shapes(layers=30, width=576, kv_width=192, feed_forward=1536)
    num_parameters = sum(rows * columns for rows, columns in shapes)
    for name, build in contestants(device):
        params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
        sets = [[torch.randn(shape, device=device) * 1e-3 for shape in shapes] for _ in range(2)]
        optimizer = build(params, lr=2e-4, weight_decay=0.0)
        milliseconds, host_milliseconds = time_steps(optimizer, params, sets, device)
        yield {
            "optimizer": name,
            "parameters": num_parameters,
            "tensors": len(shapes),
            "ms": round(milliseconds, 3),
            "host_ms": round(host_milliseconds, 3),
        }


def time_steps(
    optimizer: torch.optim.Optimizer,
    params: list[torch.nn.Parameter],
    sets: list[list[torch.Tensor]],
    device: torch.device,
) -> tuple[float, float]:
    """Return the median milliseconds of a whole step, and of the host's part of it."""
    whole, host = [], []
    for number, grads in zip(range(25), itertools.cycle(sets), strict=False):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        _wait(device)
        start = time.perf_counter()
        optimizer.step()
        returned = time.perf_counter()
        _wait(device)
        # The first steps make state and compile kernels.
        if number >= 5:
            whole.append(time.perf_counter() - start)
            host.append(returned - start)
    return 1e3 * statistics.median(whole), 1e3 * statistics.median(host)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
