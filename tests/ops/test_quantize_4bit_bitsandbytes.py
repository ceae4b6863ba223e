"""Against the live bitsandbytes on the CPU: bit for bit, but for the corners stated at the end."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.ops import dequantize_4bit, dequantize_4bit_reference, quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.codebooks import code_pairs, codebook_values, dynamic_map, thresholds
from tests.ops.quantize_cases import DTYPES, SHAPES, SPECS, make_weight

SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.codebook}-{s.block_size}-{s.double_quant:d}")


@pytest.fixture(autouse=True)
def _without_compiling() -> Iterator[None]:
    # bitsandbytes hands odd shapes to torch.compile, which takes seconds for each.
    with torch.compiler.set_stance("force_eager"):
        yield


def quantize_theirs(weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(
        weight, blocksize=spec.block_size, quant_type=spec.codebook, compress_statistics=spec.double_quant
    )


def assert_equal_to_theirs(q: QuantizedTensor, packed: torch.Tensor, state: bnb.QuantState) -> None:
    ours, theirs = q.packed, packed.view(-1)
    if q.codebook == "fp4":
        # Which of FP4's two codes for zero is taken hangs on how their argsort orders equal numbers.
        ours, theirs = (code_pairs("fp4")[p.int()] for p in (ours, theirs))
    assert torch.equal(ours, theirs)
    assert torch.equal(q.absmax, state.absmax)
    if q.double_quant:
        assert q.absmax_scale is not None
        assert q.absmax_offset is not None
        assert torch.equal(q.absmax_scale, state.state2.absmax)
        assert torch.equal(q.absmax_offset, state.offset)


def assert_within_one_rounding(expected: torch.Tensor, actual: torch.Tensor) -> None:
    if expected.dtype == torch.float32:
        assert torch.equal(expected, actual)
    else:
        steps = (expected.view(torch.int16).int() - actual.view(torch.int16).int()).abs()
        assert ((steps <= 1) | (expected == actual)).all()


@SPEC
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_4bit_equals_bitsandbytes(spec: QuantSpec, dtype: torch.dtype) -> None:
    for seed, shape in enumerate((*SHAPES, (130, 515))):
        weight = make_weight(shape, dtype, seed=seed)
        packed, state = quantize_theirs(weight, spec)
        q = quantize_4bit(weight, spec)
        assert_equal_to_theirs(q, packed, state)
        theirs = bnb.dequantize_4bit(packed, state).view(shape)
        assert_within_one_rounding(theirs, dequantize_4bit(q))
        assert_within_one_rounding(theirs, dequantize_4bit_reference(q))


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-39, 1.1e-38, 1e-37, 1e-20, 1e37])
def test_quantize_4bit_equals_bitsandbytes_at_the_ends_of_the_range(codebook: str, scale: float) -> None:
    for numel in (64, 100, 70_000):
        for double_quant in (False, True):
            weight = torch.randn(numel).clamp(-3, 3) * scale
            spec = QuantSpec(codebook=codebook, double_quant=double_quant)
            assert_equal_to_theirs(quantize_4bit(weight, spec), *quantize_theirs(weight, spec))


def test_tables_equal_bitsandbytes() -> None:
    for codebook in ("nf4", "fp4"):
        assert torch.equal(codebook_values(codebook), bnb.get_4bit_type(codebook, device="cpu"))
    for signed in (False, True):
        assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed))


def test_corner_thresholds_of_nf4_differ_by_one_unit_in_the_last_place() -> None:
    values = codebook_values("nf4")
    midpoints = (values[:-1] + values[1:]) / 2
    steps = thresholds("nf4").view(torch.int32) - midpoints.view(torch.int32)
    # Toward larger magnitudes, as bit patterns count: in CUDA's order, places 0, 8, 12 and 14.
    assert steps.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, -1, 0, -1]

    x = torch.maximum(thresholds("nf4"), midpoints)
    weight = torch.nn.functional.pad(torch.cat([x, torch.ones(1)]), (0, 48))
    packed, _ = quantize_theirs(weight, QuantSpec())
    ours, theirs = (torch.stack([p >> 4, p & 15], dim=1).view(-1)[:15].int() for p in (
        quantize_4bit(weight, QuantSpec()).packed, packed.view(-1)))  # fmt: skip
    assert (ours - theirs).tolist() == [1, 0, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 1, 0, 1]


def test_corner_zeros_have_the_codes_of_the_cpu_path() -> None:
    for shape in ((64,), (100,)):
        packed, state = quantize_theirs(torch.zeros(shape), QuantSpec(double_quant=False))
        q = quantize_4bit(torch.zeros(shape), QuantSpec(double_quant=False))
        assert set(q.packed.tolist()) == set(packed.view(-1).tolist()) == {0x77}
        assert torch.equal(q.absmax, state.absmax)
