"""The frozen products of one Llama-7B block in fp8 beside 16 bits, with and without what brings factors to fp8.

4096 tokens, rank 16 on all seven projections, NF4 with double quantisation. `part` says what is timed:

    product       of factors that are there already; "fast" with sums in the tensor cores all along
    activations   brought to fp8, with the adapter's columns forward, with the factors of rows backward
    weight        restored from 4 bits
    group         all that a group of projections does forward, or backward to its input

`ms` is from a graph's replay, buffers outgrowing the cache. The last rows sum up each part over the block. On a GPU
only.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.measure import num_buffer_sets, time_on_gpu
from halfbyte.nn import Linear4bit, LoraLinear
from halfbyte.nn.projection_group import Products, ProjectionGroup
from halfbyte.ops.block_dropout import BlockDropout
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.dequantize_fp8 import dequantize_fp8, row_scales
from halfbyte.ops.e4m3 import FP8, why_no_fp8
from halfbyte.ops.product_fp8 import product_fp8
from halfbyte.ops.quantize_rows_fp8 import quantize_rows_fp8
from halfbyte.ops.workspace import Workspace
from halfbyte.quant import QuantizedTensor, QuantSpec

TOKENS, RANK = 4096, 16
# Outputs of the projections of a group, and their input.
GROUPS = {"qkv": ((4096, 4096, 4096), 4096), "o": ((4096,), 4096), "gate_up": ((11008, 11008), 4096)}
GROUPS |= {"down": ((4096,), 11008)}
NO_DROPOUT = BlockDropout(0.0, None)
Row = dict[str, object]
Call = Callable[[], object]


def rows(device: torch.device) -> Iterator[Row]:
    """Yield one measurement for each group, direction, part and way, and their sums."""
    if why_no_fp8(device) is not None:
        return
    sums: dict[tuple[str, str], float] = collections.defaultdict(float)
    with torch.no_grad():
        for name, (outputs, width) in GROUPS.items():
            for direction in ("forward", "backward"):
                for part, way, ms, rate in measure(outputs, width, direction, device):
                    sums[part, way] += ms
                    yield {"group": name, "direction": direction, "part": part, "way": way, "ms": round(ms, 4)} | rate
    for (part, way), ms in sums.items():
        yield {"group": "block", "direction": "both", "part": part, "way": way, "ms": round(ms, 4)}


def measure(
    outputs: tuple[int, ...], width: int, direction: str, device: torch.device
) -> Iterator[tuple[str, str, float, Row]]:
    is_forward, height = direction == "forward", sum(outputs)
    summed, columns, ranks = (width, height, RANK * len(outputs)) if is_forward else (height, width, 0)
    flops = 2 * TOKENS * summed * columns
    for way, calls in products(summed, columns, ranks, device):
        ms = time_calls(calls)
        yield "product", way, ms, {"tflops": round(flops / ms / 1e9)}
    x_TK = torch.randn(TOKENS, summed, device=device).bfloat16()
    ms = time_calls(activations(x_TK, ranks, has_factors=not is_forward))
    yield "activations", "fp8", ms, {"gb_per_s_moved": round(3 * x_TK.numel() / ms / 1e6)}
    layers = [make_layer(width, count, device) for count in outputs]
    weights = [weight_of(layer) for layer in layers]
    scales = [row_scales(q) for q in weights]
    for way, bytes_each in (("16bit", 2.5), ("fp8", 1.5)):
        ms = time_calls([functools.partial(restore, weights, scales, way, is_transposed=not is_forward)])
        yield "weight", way, ms, {"gb_per_s_moved": round(bytes_each * height * width / ms / 1e6)}
    ways: tuple[Products, ...] = ("16bit", "fp8")
    for products_in in ways:
        group = ProjectionGroup(
            layers, kind="group", workspace=Workspace(), owners={}, adapters_ride=True, products=products_in
        )
        yield "group", products_in, time_calls([functools.partial(run_group, group, x_TK, is_forward=is_forward)]), {}


def products(summed: int, columns: int, ranks: int, device: torch.device) -> Iterator[tuple[str, list[Call]]]:
    """Yield the products of factors that are there already, each on several sets of buffers."""
    out = torch.empty(TOKENS, columns, dtype=torch.bfloat16, device=device)
    sets = num_buffer_sets(summed * (TOKENS + columns))

    def make(width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (torch.randn(TOKENS, width, device=device), torch.randn(columns, width, device=device)) for _ in range(sets)
        ]

    pairs = [(a.bfloat16(), b.bfloat16()) for a, b in make(summed + ranks)]
    # Backward the weight is in its own order.
    weights = [b.T if ranks else b.T.contiguous() for _, b in pairs]
    yield "16bit", [functools.partial(torch.mm, a, b, out=out) for (a, _), b in zip(pairs, weights, strict=True)]
    codes = [(a.to(FP8), b.to(FP8)) for a, b in make(summed + 3 * ranks)]
    scales = {"scale_a_T": torch.ones(TOKENS, device=device), "scale_b_N": torch.ones(columns, device=device)}
    for way, fast in (("fp8", False), ("fp8 fast", True)):
        yield way, [functools.partial(product_fp8, a, b, **scales, out=out, fast_accumulation=fast) for a, b in codes]


def activations(x_TK: torch.Tensor, ranks: int, *, has_factors: bool) -> list[Call]:
    codes = torch.empty(TOKENS, x_TK.shape[1] + 3 * ranks, dtype=FP8, device=x_TK.device)
    scale = torch.empty(TOKENS, device=x_TK.device)
    factors = torch.ones(x_TK.shape[1], dtype=torch.bfloat16, device=x_TK.device) if has_factors else None
    u_TR = x_TK[:, :ranks].contiguous() if ranks else None
    copies = [x_TK, *(x_TK.clone() for _ in range(num_buffer_sets(x_TK.nbytes) - 1))]
    return [
        functools.partial(quantize_rows_fp8, x, codes_TE=codes, scale_T=scale, u_TR=u_TR, factor_D=factors)
        for x in copies
    ]


def make_layer(width: int, outputs: int, device: torch.device) -> LoraLinear:
    linear = nn.Linear(width, outputs, bias=False, device=device, dtype=torch.bfloat16)
    layer = LoraLinear.from_base(Linear4bit.from_linear(linear, QuantSpec()), rank=RANK, alpha=32)
    nn.init.normal_(layer.lora_B, std=1e-3)
    return layer


def weight_of(layer: LoraLinear) -> QuantizedTensor:
    assert isinstance(layer.base, Linear4bit)
    return layer.base.quantized


def restore(weights: list[QuantizedTensor], scales: list[torch.Tensor], way: str, *, is_transposed: bool) -> None:
    for q, scale_F in zip(weights, scales, strict=True):
        if way == "fp8":
            shape = q.shape[::-1] if is_transposed else q.shape
            dequantize_fp8(q, scale_F, out=torch.empty(shape, dtype=FP8, device=q.device), is_transposed=is_transposed)
        else:
            dequantize_4bit(q, out=torch.empty(q.shape, dtype=torch.bfloat16, device=q.device))


def run_group(group: ProjectionGroup, x_TK: torch.Tensor, *, is_forward: bool) -> None:
    if is_forward:
        x_TE = group.take_input("input", TOKENS, dtype=x_TK.dtype, device=x_TK.device)
        group.forward(x_TE, NO_DROPOUT)
    else:
        group.forget_weight()
        group.backward_input(x_TK, NO_DROPOUT, in_parts=True)


def time_calls(calls: list[Call]) -> float:
    return time_on_gpu(calls)[0]
