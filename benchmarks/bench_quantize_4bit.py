"""Quantising a weight to 4 bits, beside bitsandbytes.

`gb_per_s_bf16` counts the weight's bytes in bf16, whatever its dtype; `gb_per_s_read` those really read. On a CPU
`temporaries_mib` is what the process grew by at the peak, the result included. On a GPU `ms` is from a graph's
replay, `ms_launched` with Python launching; every way to launch our kernel has its row on two shapes.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import num_buffer_sets, peak_temporary_mib, time_on_cpu, time_on_gpu
from halfbyte.kernels.quantize_4bit import QuantizeLaunch
from halfbyte.ops import quantize_4bit
from halfbyte.ops.quantize_4bit import quantize_4bit_triton
from halfbyte.quant import QuantSpec

CPU_SHAPES = [(4096, 4096), (11008, 4096), (1536, 576), (576, 576)]
GPU_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (14336, 4096), (1536, 576), (65536, 2048)]
LAUNCH_SHAPES = [(4096, 4096), (11008, 4096)]
LAUNCHES = [
    QuantizeLaunch(search=search, elements_per_program=elements, num_warps=num_warps)
    for search in ("bins", "tree")
    for elements, num_warps in ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))
]
Row = dict[str, object]


def rows(device: torch.device) -> Iterator[Row]:
    """Yield one measurement for each shape, dtype, format and implementation."""
    yield from gpu_rows(device) if device.type == "cuda" else cpu_rows()


def cpu_rows() -> Iterator[Row]:
    for shape, dtype, double_quant in itertools.product(CPU_SHAPES, (torch.bfloat16, torch.float32), (True, False)):
        weight, spec = torch.randn(shape).mul_(0.02).to(dtype), QuantSpec(double_quant=double_quant)
        calls: dict[str, Callable[[], object]] = {
            "halfbyte torch": lambda weight=weight, spec=spec: quantize_4bit(weight, spec)
        }
        if importlib.util.find_spec("bitsandbytes") is not None:
            calls["bitsandbytes"] = bitsandbytes_call(weight, double_quant)
        for name, call in calls.items():
            median, best = time_on_cpu(call, warm_up=1)
            temporaries = peak_temporary_mib(call)
            yield describe(name, weight, spec) | {
                "ms": round(median, 4),
                "ms_best": round(best, 4),
                "gb_per_s_bf16": round(2 * weight.numel() / median / 1e6, 4),
                "gb_per_s_bf16_best": round(2 * weight.numel() / best / 1e6, 4),
                "temporaries_mib": None if temporaries is None else round(temporaries, 1),
                "weight_mib": round(weight.nbytes / 2**20, 1),
            }


def gpu_rows(device: torch.device) -> Iterator[Row]:
    for shape in GPU_SHAPES:
        for spec, dtype in itertools.product(
            (QuantSpec(), QuantSpec(double_quant=False), QuantSpec(codebook="fp4"), QuantSpec(block_size=4096)),
            (torch.bfloat16, torch.float16, torch.float32),
        ):
            weights = make_weights(shape, dtype, device)
            calls = [lambda w=w, spec=spec: quantize_4bit(w, spec) for w in weights]
            yield gpu_row("halfbyte triton", weights[0], spec, calls)
        if importlib.util.find_spec("bitsandbytes") is not None:
            weights = make_weights(shape, torch.bfloat16, device)
            yield gpu_row("bitsandbytes", weights[0], QuantSpec(), [bitsandbytes_call(w, True) for w in weights])
    for shape, launch, double_quant in itertools.product(LAUNCH_SHAPES, LAUNCHES, (True, False)):
        spec, weights = QuantSpec(double_quant=double_quant), make_weights(shape, torch.bfloat16, device)
        calls = [lambda w=w, spec=spec, launch=launch: quantize_4bit_triton(w, spec, launch=launch) for w in weights]
        yield gpu_row("halfbyte triton", weights[0], spec, calls) | {"launch": str(launch)}


def make_weights(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    count = num_buffer_sets(shape[0] * shape[1] * dtype.itemsize)
    return [torch.randn(shape, device=device).mul_(0.02).to(dtype) for _ in range(count)]


def gpu_row(name: str, weight: torch.Tensor, spec: QuantSpec, calls: list[Callable[[], object]]) -> Row:
    ms, launched = time_on_gpu(calls, is_capturable=name != "bitsandbytes")
    return describe(name, weight, spec) | {
        "ms": round(ms, 5),
        "ms_launched": round(launched, 5),
        "gb_per_s_read": round(weight.nbytes / ms / 1e6),
        "gb_per_s_read_launched": round(weight.nbytes / launched / 1e6),
    }


def describe(name: str, weight: torch.Tensor, spec: QuantSpec) -> Row:
    return {
        "op": "quantize_4bit",
        "backend": name,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "codebook": spec.codebook,
        "block_size": spec.block_size,
        "double_quant": spec.double_quant,
    }


def bitsandbytes_call(weight: torch.Tensor, double_quant: bool) -> Callable[[], object]:
    import bitsandbytes.functional as bnb

    return lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
