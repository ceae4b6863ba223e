"""One frozen 4-bit layer with its adapter: ours, peft's on bitsandbytes, and the frozen product alone.

Rank 16, dropout 0.05, NF4 with double quantisation, in the compute dtype that halfbyte chooses on this machine. On a
CPU the shapes of SmolLM2-135M with 2048 tokens, on a GPU those of a Llama-7B with 4096; a step is a forward and a
backward that gives the gradients of input and adapter. The peer runs under autocast, as transformers' Trainer runs
it. One token is a decoding step: eval mode, no grad, weights expanded beforehand where an implementation can.

`ms` is a median; `overhead` is over the frozen product alone, in 16 bits and never quantised, without an adapter.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from halfbyte.device import default_compute_dtype
from halfbyte.nn import Linear4bit, LoraLinear
from halfbyte.nn.inference import default_expanded_dtype
from halfbyte.quant import QuantSpec

RANK, ALPHA, DROPOUT = 16, 32, 0.05
CPU_SHAPES, CPU_TOKENS = [(576, 576), (576, 192), (576, 1536), (1536, 576)], 2048
GPU_SHAPES, GPU_TOKENS = [(4096, 4096), (4096, 11008), (11008, 4096)], 4096


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield one measurement for each shape, number of tokens and implementation."""
    shapes, num_tokens = (GPU_SHAPES, GPU_TOKENS) if device.type == "cuda" else (CPU_SHAPES, CPU_TOKENS)
    dtype = default_compute_dtype(device)
    for in_features, out_features in shapes:
        linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype).requires_grad_(False)
        for tokens, measure in ((num_tokens, time_step), (1, time_token)):
            limit = None
            for name, layer in layers(linear, tokens):
                milliseconds = measure(layer, tokens, linear)
                limit = limit or milliseconds
                yield {
                    "layer": name,
                    "in_features": in_features,
                    "out_features": out_features,
                    "tokens": tokens,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": round(milliseconds, 4),
                    "overhead": f"{100 * (milliseconds / limit - 1):.0f}%",
                }


def layers(linear: nn.Linear, tokens: int) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Yield name and function of each implementation, the frozen product alone first."""
    yield "frozen product alone", linear
    ours = LoraLinear.from_base(
        Linear4bit.from_linear(linear, QuantSpec()), rank=RANK, alpha=ALPHA, dropout=DROPOUT
    ).train(tokens > 1)
    yield "halfbyte", ours
    if tokens == 1:
        ours.expanded = ours.expand(default_expanded_dtype(linear))
        yield "halfbyte expanded", ours
    if all(importlib.util.find_spec(name) for name in ("bitsandbytes", "peft")):
        yield "peft on bitsandbytes", peer_layer(linear).train(tokens > 1)


def peer_layer(linear: nn.Linear) -> nn.Module:
    """Build the same layer from the usual stack."""
    import bitsandbytes
    import peft

    dtype = linear.weight.dtype
    frozen = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    frozen.weight = bitsandbytes.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=["0"])
    return peft.get_peft_model(nn.Sequential(frozen.to(linear.weight.device)), config)


def time_step(layer: Callable[[torch.Tensor], torch.Tensor], tokens: int, linear: nn.Linear) -> float:
    """Return the median milliseconds of a forward and a backward."""
    device, dtype = linear.weight.device, linear.weight.dtype
    x = torch.randn(tokens, linear.in_features, device=device, dtype=dtype).requires_grad_()
    grad_y = torch.randn(tokens, linear.out_features, device=device, dtype=dtype)
    autocast = dtype != torch.float32 and not isinstance(layer, (nn.Linear, LoraLinear))

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=autocast):
            y = layer(x)
        y.backward(grad_y)
        x.grad = None

    return time_calls(step, device, repeats=15)


@torch.no_grad()
def time_token(layer: Callable[[torch.Tensor], torch.Tensor], tokens: int, linear: nn.Linear) -> float:
    """Return the median milliseconds of a forward for decoding."""
    device, dtype = linear.weight.device, linear.weight.dtype
    x = torch.randn(1, tokens, linear.in_features, device=device, dtype=dtype)
    return time_calls(lambda: layer(x), device, repeats=101)


def time_calls(call: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Return the median milliseconds of a call, the first few left out."""
    seconds = []
    for number in range(repeats + 4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 4:
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)
