"""Restoring a weight from 4 bits into a reused buffer, beside bitsandbytes.

`gb_per_s_bf16` counts the weight's bytes in bf16, whatever the dtype of the output; `gb_per_s_moved` the bytes read
and written. On a GPU `ms` is from a graph's replay, `ms_launched` with Python launching; every way to launch our
kernel has its row on two shapes, and `device copy` is the ceiling.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import num_buffer_sets, peak_temporary_mib, time_on_cpu, time_on_gpu
from halfbyte.kernels.dequantize_4bit import DequantizeLaunch
from halfbyte.ops import Workspace, dequantize_4bit, quantize_4bit
from halfbyte.ops.dequantize_4bit import dequantize_4bit_triton
from halfbyte.quant import QuantizedTensor, QuantSpec

CPU_SHAPES = [(4096, 4096), (11008, 4096), (1536, 576), (576, 576)]
GPU_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (14336, 4096), (1536, 576), (65536, 2048)]
LAUNCH_SHAPES = [(4096, 4096), (11008, 4096)]
LAUNCHES = [
    DequantizeLaunch(lookup=lookup, elements_per_program=elements, num_warps=num_warps)
    for lookup in ("codes", "pairs", "rounded")
    for elements, num_warps in ((1024, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (16384, 8))
]
Row = dict[str, object]


def rows(device: torch.device) -> Iterator[Row]:
    """Yield one measurement for each shape, dtype, format and implementation."""
    yield from gpu_rows(device) if device.type == "cuda" else cpu_rows()


def cpu_rows() -> Iterator[Row]:
    for shape, dtype, double_quant in itertools.product(CPU_SHAPES, (torch.bfloat16, torch.float32), (True, False)):
        weight = torch.randn(shape).mul_(0.02).to(dtype)
        out, workspace = torch.empty_like(weight), Workspace()
        q = quantize_4bit(weight, QuantSpec(double_quant=double_quant))
        calls: dict[str, Callable[[], object]] = {
            "halfbyte torch": lambda q=q, out=out, workspace=workspace: dequantize_4bit(q, out=out, workspace=workspace)
        }
        if importlib.util.find_spec("bitsandbytes") is not None:
            calls["bitsandbytes"] = bitsandbytes_call(weight, double_quant)
        for name, call in calls.items():
            median, best = time_on_cpu(call)
            temporaries = peak_temporary_mib(call)
            yield describe(name, q, dtype) | {
                "ms": round(median, 4),
                "ms_best": round(best, 4),
                "gb_per_s_bf16": round(2 * q.numel / median / 1e6, 3),
                "gb_per_s_bf16_best": round(2 * q.numel / best / 1e6, 3),
                "temporaries_mib": None if temporaries is None else round(temporaries, 1),
            }


def gpu_rows(device: torch.device) -> Iterator[Row]:
    yield copy_row(device)
    for shape in GPU_SHAPES:
        for spec, dtype in itertools.product(
            (QuantSpec(), QuantSpec(double_quant=False), QuantSpec(codebook="fp4")),
            (torch.bfloat16, torch.float16, torch.float32),
        ):
            sets = make_sets(shape, spec, dtype, device)
            yield gpu_row("halfbyte triton", sets, [lambda s=s: dequantize_4bit(s[0], out=s[1]) for s in sets])
        sets = make_sets(shape, QuantSpec(), torch.bfloat16, device)
        spare = [torch.empty(shape[0], shape[1] + 16, dtype=torch.bfloat16, device=device) for _ in sets]
        wide = [(q, buffer[:, : shape[1]]) for (q, _), buffer in zip(sets, spare, strict=True)]
        calls = [lambda s=s: dequantize_4bit(s[0], out=s[1]) for s in wide]
        yield gpu_row("halfbyte triton, 16 spare columns", wide, calls)
        if importlib.util.find_spec("bitsandbytes") is not None:
            weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in sets]
            yield gpu_row("bitsandbytes", sets, [bitsandbytes_call(weight, True) for weight in weights])
    for shape, launch in itertools.product(LAUNCH_SHAPES, LAUNCHES):
        sets = make_sets(shape, QuantSpec(), torch.bfloat16, device)
        calls = [lambda s=s, launch=launch: dequantize_4bit_triton(s[0], s[1], launch=launch) for s in sets]
        yield gpu_row("halfbyte triton", sets, calls) | {"launch": str(launch)}


def make_sets(
    shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> list[tuple[QuantizedTensor, torch.Tensor]]:
    count = num_buffer_sets(shape[0] * shape[1] * dtype.itemsize)
    q = quantize_4bit(torch.randn(shape, dtype=torch.bfloat16, device=device), spec)
    first = (q, torch.empty(shape, dtype=dtype, device=device))
    copies = ((QuantizedTensor(**copy_fields(q)), torch.empty_like(first[1])) for _ in range(count - 1))
    return [first, *copies]


def copy_fields(q: QuantizedTensor) -> dict[str, object]:
    fields = {name: getattr(q, name) for name in QuantizedTensor.__dataclass_fields__}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}


def gpu_row(name: str, sets: list[tuple[QuantizedTensor, torch.Tensor]], calls: list[Callable[[], object]]) -> Row:
    q, out = sets[0]
    ms, launched = time_on_gpu(calls, is_capturable=name != "bitsandbytes")
    moved = q.nbytes + q.numel * out.itemsize
    return describe(name, q, out.dtype) | {
        "ms": round(ms, 5),
        "ms_launched": round(launched, 5),
        "gb_per_s_moved": round(moved / ms / 1e6),
        "gb_per_s_moved_launched": round(moved / launched / 1e6),
    }


def describe(name: str, q: QuantizedTensor, dtype: torch.dtype) -> Row:
    return {
        "op": "dequantize_4bit",
        "backend": name,
        "shape": list(q.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "codebook": q.codebook,
        "block_size": q.block_size,
        "double_quant": q.double_quant,
    }


def copy_row(device: torch.device) -> Row:
    pairs = [torch.empty(2, 1 << 28, dtype=torch.uint8, device=device) for _ in range(2)]
    ms, _ = time_on_gpu([lambda p=p: p[0].copy_(p[1]) for p in pairs])
    return {"op": "dequantize_4bit", "backend": "device copy", "ms": ms, "gb_per_s_moved": round(2 * 2**28 / ms / 1e6)}


def bitsandbytes_call(weight: torch.Tensor, double_quant: bool) -> Callable[[], object]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    return lambda: bnb.dequantize_4bit(packed, state)
