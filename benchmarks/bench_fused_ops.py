"""The fused block's elementwise operations: norm, rotary embedding, gated product, dropout by counter.

`gb_per_s_moved` counts what a call has to read and write. On a GPU `ms` is from a graph's replay, `ms_launched` with
Python launching, and `device copy` is the ceiling. In place on a GPU means in place again and again, so gates and
gradients soon are no numbers any more; that takes no other time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.bench_dequantize_4bit import copy_row
from benchmarks.measure import num_buffer_sets, time_on_cpu, time_on_gpu
from halfbyte.ops.adapter_inner import adapter_inner
from halfbyte.ops.counter_dropout import CounterDropout, drop_copy
from halfbyte.ops.rms_norm import rms_norm, rms_norm_backward
from halfbyte.ops.rotary import rotate_
from halfbyte.ops.swiglu import swiglu, swiglu_backward_

# Tokens, width, feed-forward width, heads of queries and keys, head width.
GPU_MODELS = [(4096, 4096, 11008, 64, 128), (2048, 576, 1536, 12, 64)]
CPU_MODELS = [(512, 576, 1536, 12, 64)]
SPARE_COLUMNS = 16
DROPOUT = CounterDropout(seed=1, probability=0.05)
Row = dict[str, object]
Case = tuple[str, int, int, Callable[[list[torch.Tensor]], object]]
"""Name, number of (tokens, width) buffers, of which so many are passed over once, and the call."""


def rows(device: torch.device) -> Iterator[Row]:
    """Yield one measurement for each operation, shape, and with and without dropout."""
    is_gpu = device.type == "cuda"
    if is_gpu:
        yield copy_row(device) | {"op": "fused_ops"}
    for num_tokens, width, ff_width, num_heads, head_width in GPU_MODELS if is_gpu else CPU_MODELS:
        dtype = torch.bfloat16
        weight = torch.ones(width, dtype=dtype, device=device)
        r = torch.ones(num_tokens, device=device)
        for case in (*norm_cases(weight, r), *dropout_cases(), *adapter_cases(width, device)):
            yield measure(case, (num_tokens, width), dtype, device)
        for case in swiglu_cases():
            yield measure(case, (num_tokens, ff_width), dtype, device)
        yield measure_rotary((num_tokens, num_heads, head_width), dtype, device)
        yield measure_head_norm((num_tokens, num_heads, head_width), dtype, device)


def norm_cases(weight: torch.Tensor, r: torch.Tensor) -> Iterator[Case]:
    yield "rms_norm of a sum", 3, 4, lambda b: rms_norm(b[0], weight, eps=1e-5, out=b[1], addend_=b[2])
    for dropout in (None, DROPOUT):
        name = "" if dropout is None else " dropout"

        def forward(b: list[torch.Tensor], dropout: CounterDropout | None = dropout) -> object:
            return rms_norm(b[0], weight, eps=1e-5, out=b[1], dropout=dropout)

        def backward(b: list[torch.Tensor], dropout: CounterDropout | None = dropout) -> object:
            apart = b[4] if dropout else None
            return rms_norm_backward(
                b[0], b[1], weight, r, out=b[2], residual=b[3], grad_adapter=apart, dropout=dropout
            )

        yield "rms_norm" + name, 2, 2, forward
        yield "rms_norm_backward" + name, 5 if dropout else 4, 5 if dropout else 4, backward


def dropout_cases() -> Iterator[Case]:
    yield "drop_copy", 2, 2, lambda b: drop_copy(b[0], DROPOUT, out=b[1])


def adapter_cases(width: int, device: torch.device) -> Iterator[Case]:
    for ranks in (16, 48):
        A = torch.randn(ranks, width, dtype=torch.bfloat16, device=device)
        for dropout in (None, DROPOUT):

            def inner(b: list[torch.Tensor], A: torch.Tensor = A, dropout: CounterDropout | None = dropout) -> object:
                return adapter_inner(b[0], A, scale=2.0, dropout=dropout)

            yield f"adapter_inner rank {ranks}" + (" dropout" if dropout else ""), 1, 1, inner


def swiglu_cases() -> Iterator[Case]:
    """Yield cases whose first two buffers are gate and up, in one."""
    yield "swiglu", 3, 3, lambda b: swiglu(b[0], out_TF=b[1])
    for dropout in (None, DROPOUT):
        name = "" if dropout is None else " dropout"

        def backward(b: list[torch.Tensor], dropout: CounterDropout | None = dropout) -> object:
            apart = b[2] if dropout else None
            return swiglu_backward_(b[0], b[1], product_TF=b[2], grad_adapter_TF=apart, dropout=dropout)

        yield "swiglu_backward_" + name, 4, 7 if dropout else 6, backward


def measure(case: Case, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Row:
    name, num_buffers, num_passes, call = case
    num_bytes = shape[0] * shape[1] * dtype.itemsize

    def make() -> list[torch.Tensor]:
        if name.startswith("swiglu"):
            gate_up = torch.randn(shape[0], 2 * shape[1], dtype=dtype, device=device)
            return [gate_up, *(wide_rows(shape, dtype, device) for _ in range(num_buffers - 2))]
        return [wide_rows(shape, dtype, device) for _ in range(num_buffers)]

    return timed(name, make, call, num_buffers * num_bytes, num_passes * num_bytes) | {"shape": list(shape)}


def measure_rotary(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Row:
    angles = torch.rand(shape[0], shape[2] // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    num_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    moved = 2 * num_bytes + cos.numel() * dtype.itemsize

    def make() -> list[torch.Tensor]:
        return [heads_of_a_wider_buffer(shape, dtype, device)]

    return timed("rotate_", make, lambda b: rotate_(b[0], cos, sin), num_bytes, moved) | {"shape": list(shape)}


def measure_head_norm(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Row:
    weight = torch.ones(shape[2], dtype=dtype, device=device)
    num_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize

    def make() -> list[torch.Tensor]:
        return [heads_of_a_wider_buffer(shape, dtype, device), torch.empty(shape, dtype=dtype, device=device)]

    def call(b: list[torch.Tensor]) -> object:
        return rms_norm(b[0], weight, eps=1e-5, out=b[1])

    return timed("rms_norm of heads", make, call, 2 * num_bytes, 2 * num_bytes) | {"shape": list(shape)}


def timed(
    name: str,
    make: Callable[[], list[torch.Tensor]],
    call: Callable[[list[torch.Tensor]], object],
    bytes_per_set: int,
    bytes_moved: int,
) -> Row:
    first = make()
    row: Row = {"op": name, "dtype": str(first[0].dtype).removeprefix("torch.")}
    if first[0].device.type == "cpu":
        median, best = time_on_cpu(lambda: call(first), seconds=0.3)
        return row | {"backend": "halfbyte torch", "ms": round(median, 4), "ms_best": round(best, 4)}
    sets = [first, *(make() for _ in range(num_buffer_sets(bytes_per_set) - 1))]
    ms, launched = time_on_gpu([lambda s=s: call(s) for s in sets])
    return row | {
        "backend": "halfbyte triton",
        "ms": round(ms, 5),
        "ms_launched": round(launched, 5),
        "gb_per_s_moved": round(bytes_moved / ms / 1e6),
    }


def wide_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a matrix with room for an adapter's columns beside its rows."""
    return torch.randn(shape[0], shape[1] + SPARE_COLUMNS, dtype=dtype, device=device)[:, : shape[1]]


def heads_of_a_wider_buffer(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the queries and keys beside half as many values again."""
    return torch.randn(shape[0], shape[1] * 3 // 2, shape[2], dtype=dtype, device=device)[:, : shape[1]]
