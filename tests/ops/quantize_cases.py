"""Weights that try the corners of 4-bit quantisation, and how results are compared."""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.ops.quantize_4bit import quantize_4bit_reference, quantize_absmax_reference
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.tensor import BLOCK_SIZES, CODEBOOKS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [
    QuantSpec(codebook=codebook, block_size=block_size, double_quant=double_quant)
    for codebook in CODEBOOKS
    for block_size in BLOCK_SIZES
    for double_quant in (False, True)
]
# One block, odd, short last block, a block and an element, more than one second-level group of the smallest blocks.
SHAPES = ((1,), (7,), (3, 21), (64, 64), (65, 63), (4097,), (5, 3, 640), (129, 96))


def make_weight(
    shape: tuple[int, ...], dtype: torch.dtype, *, device: torch.device | str = "cpu", seed: int = 0
) -> torch.Tensor:
    """Return normal numbers among which stretches are zero, denormal, tiny, all equal, and for an even seed huge."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(torch.Size(shape).numel(), generator=generator)
    largest = torch.finfo(dtype).max
    huge = 20.0 if seed % 2 else largest**0.9
    for place, factor in enumerate((0.0, 1e-41, 3e-38, 2e-6, huge, 0.02)):
        start = (2 * place + 1) * flat.numel() // 13
        flat[start : start + flat.numel() // 13] *= factor
    flat[::97] *= 10
    flat[-(flat.numel() // 13) :] = 0.5
    return flat.clamp(-largest, largest).to(dtype).view(shape).to(device)


def reference_with_offset(weight: torch.Tensor, spec: QuantSpec, q: QuantizedTensor) -> QuantizedTensor:
    """Return what the reference on the CPU makes of a weight, given the mean of absmax that `q` was made with."""
    single = QuantSpec(codebook=spec.codebook, block_size=spec.block_size, double_quant=False)
    expected = quantize_4bit_reference(weight.cpu(), single)
    if q.absmax_offset is None:
        return expected
    # In fp64: a sum of huge numbers overflows in fp32.
    assert abs(q.absmax_offset.item() / expected.absmax.double().mean().item() - 1) < 1e-6
    codes, scale = quantize_absmax_reference(expected.absmax, q.absmax_offset.cpu())
    return dataclasses.replace(expected, absmax=codes, absmax_scale=scale, absmax_offset=q.absmax_offset)


def assert_same_bytes(expected: QuantizedTensor, actual: QuantizedTensor) -> None:
    """Fail unless the two are equal bit for bit."""
    for field in dataclasses.fields(QuantizedTensor):
        left, right = getattr(expected, field.name), getattr(actual, field.name)
        if not isinstance(left, torch.Tensor):
            assert left == right, f"{field.name}: {right}, expected {left}"
            continue
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        wrong = (left.cpu().view(-1) != right.cpu().view(-1)).nonzero().view(-1)
        assert not len(wrong), f"{field.name} differs in {len(wrong)} of {left.numel()}, first at {int(wrong[0])}"


def assert_same_numbers(expected: torch.Tensor, actual: torch.Tensor) -> None:
    """Fail unless the two are equal bit for bit, the sign of zero and what kind of NaN left aside."""
    assert expected.dtype == actual.dtype
    assert expected.shape == actual.shape
    wrong = (expected.cpu() != actual.cpu()) & ~(expected.cpu().isnan() & actual.cpu().isnan())
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ"
