"""Multiplying a few tokens by a 4-bit weight, beside bitsandbytes' own product for one token.

`gb_per_s_4bit` counts the packed bytes of the weight alone. On a GPU `us` is from a graph's replay, `us_launched` with
Python launching; some ways to launch our kernel have rows on three shapes, groups are what a layer multiplies its
tokens by in one launch, with adapters of rank 16 and a residual where there is one, and `halfbyte expanded` is what the
same product costs when the weight is expanded first. On a CPU there is no kernel, and nothing to time.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch

from benchmarks.bench_dequantize_4bit import copy_fields
from benchmarks.measure import num_buffer_sets, time_on_gpu
from halfbyte.kernels.matvec_4bit import MatvecLaunch
from halfbyte.ops import Workspace, quantize_4bit
from halfbyte.ops.expand_weight import expand_weight
from halfbyte.ops.matvec_4bit import OuterAdapters, matvec_4bit, matvec_4bit_group, matvec_4bit_triton
from halfbyte.quant import QuantizedTensor, QuantSpec

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (14336, 4096), (576, 576), (1536, 576)]
LAUNCH_SHAPES = [(11008, 4096), (4096, 11008), (4096, 4096)]
LAUNCHES = [
    MatvecLaunch(lookup=lookup, rows_per_program=rows, num_warps=num_warps, prefetch=prefetch)
    for lookup, rows, num_warps in (
        *(("shuffle", 4, 1), ("shuffle", 4, 2), ("shuffle", 8, 1), ("shuffle", 8, 2)),
        *(("tensor", 16, 4), ("tensor", 16, 8), ("tensor", 32, 4)),
    )
    for prefetch in (False, True)
]
GROUPS = [(4096, (4096, 4096, 4096)), (4096, (4096,)), (4096, (11008, 11008)), (11008, (4096,))]
RANK = 16
TOKEN_LAUNCHES = [launch for launch in LAUNCHES if launch.lookup == "tensor"]
Row = dict[str, object]


def rows(device: torch.device) -> Iterator[Row]:
    """Yield one measurement for each shape, format, number of tokens and implementation."""
    if device.type != "cuda":
        return
    for shape in SHAPES:
        for spec, dtype in (
            *((QuantSpec(), dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
            (QuantSpec(double_quant=False), torch.bfloat16),
            (QuantSpec(codebook="fp4"), torch.bfloat16),
        ):
            weights = make_weights(shape, spec, device)
            x = torch.randn(1, shape[1], dtype=dtype, device=device)
            yield row("halfbyte triton", weights, x, [lambda q=q, x=x: matvec_4bit(x, q) for q in weights])
        yield from peer_rows(shape, device)
    for shape, num_tokens in itertools.product(LAUNCH_SHAPES[:1], (2, 4, 8)):
        yield from launch_rows(shape, num_tokens, TOKEN_LAUNCHES, device)
    for shape in LAUNCH_SHAPES:
        yield from launch_rows(shape, 1, LAUNCHES, device)
    for (in_features, widths), num_tokens in itertools.product(GROUPS, (1, 4, 8)):
        yield group_row(in_features, widths, num_tokens, device)


def launch_rows(
    shape: tuple[int, int], num_tokens: int, launches: list[MatvecLaunch], device: torch.device
) -> Iterator[Row]:
    weights = make_weights(shape, QuantSpec(), device)
    x = torch.randn(num_tokens, shape[1], dtype=torch.bfloat16, device=device)
    for launch in launches:
        calls = [lambda q=q, launch=launch: matvec_4bit_triton(x, q, launch=launch) for q in weights]
        yield row("halfbyte triton", weights, x, calls) | {"launch": str(launch)}


def group_row(in_features: int, widths: tuple[int, ...], num_tokens: int, device: torch.device) -> Row:
    weights = [make_weights((width, in_features), QuantSpec(), device) for width in widths]
    # As many of each as of the one with fewest.
    members = list(zip(*weights, strict=False))
    x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16, device=device)
    Bs = [torch.randn(width, RANK, device=device) for width in widths]
    adapters = OuterAdapters.stack(Bs, widths, dtype=x.dtype, device=device)
    terms = {
        "adapters": adapters,
        "u_TR": torch.randn(num_tokens, RANK * len(widths), device=device),
        "add": torch.randn(num_tokens, *widths, dtype=x.dtype, device=device) if len(widths) == 1 else None,
    }
    calls = [functools.partial(matvec_4bit_group, x, group, **terms) for group in members]
    ms, launched = time_on_gpu(calls)
    return {
        "op": "matvec_4bit_group",
        "backend": "halfbyte triton",
        "shape": [list(widths), in_features],
        "tokens": num_tokens,
        "us": round(ms * 1e3, 2),
        "us_launched": round(launched * 1e3, 2),
        "gb_per_s_4bit": round(sum(q.packed.nbytes for q in members[0]) / ms / 1e6),
    }


def peer_rows(shape: tuple[int, int], device: torch.device) -> Iterator[Row]:
    weights = make_weights(shape, QuantSpec(), device)
    x = torch.randn(1, shape[1], dtype=torch.bfloat16, device=device)
    workspace = Workspace()

    def expanded(q: QuantizedTensor) -> torch.Tensor:
        return x @ expand_weight(q, dtype=x.dtype, workspace=workspace).T

    yield row("halfbyte expanded", weights, x, [lambda q=q: expanded(q) for q in weights])
    if importlib.util.find_spec("bitsandbytes") is not None:
        calls = [bitsandbytes_call(shape, x) for _ in weights]
        yield row("bitsandbytes", weights, x, calls)


def make_weights(shape: tuple[int, int], spec: QuantSpec, device: torch.device) -> list[QuantizedTensor]:
    q = quantize_4bit(torch.randn(shape, dtype=torch.bfloat16, device=device), spec)
    return [q, *(QuantizedTensor(**copy_fields(q)) for _ in range(num_buffer_sets(q.nbytes) - 1))]


def row(name: str, weights: list[QuantizedTensor], x: torch.Tensor, calls: list[Callable[[], object]]) -> Row:
    q = weights[0]
    ms, launched = time_on_gpu(calls, is_capturable=name != "bitsandbytes")
    return {
        "op": "matvec_4bit",
        "backend": name,
        "shape": list(q.shape),
        "tokens": x.shape[0],
        "dtype": str(x.dtype).removeprefix("torch."),
        "codebook": q.codebook,
        "block_size": q.block_size,
        "double_quant": q.double_quant,
        "us": round(ms * 1e3, 2),
        "us_launched": round(launched * 1e3, 2),
        "gb_per_s_4bit": round(q.packed.nbytes / ms / 1e6),
        "gb_per_s_4bit_launched": round(q.packed.nbytes / launched / 1e6),
    }


def bitsandbytes_call(shape: tuple[int, int], x: torch.Tensor) -> Callable[[], object]:
    import bitsandbytes as bnb

    weight = torch.randn(shape, dtype=x.dtype, device=x.device)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return lambda: bnb.matmul_4bit(x, packed.t(), quant_state=state)
