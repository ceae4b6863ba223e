from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import BackendError, ConfigError
from halfbyte.kernels.quantize_4bit import QuantizeLaunch
from halfbyte.ops import dequantize_4bit, quantize_4bit, quantize_4bit_reference
from halfbyte.ops.dequantize_4bit import restore_absmax_reference
from halfbyte.ops.quantize_4bit import quantize_4bit_triton
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.codebooks import codebook_values, sorted_codes, thresholds
from halfbyte.quant.tensor import CODEBOOKS
from tests.ops.quantize_cases import DTYPES, SHAPES, SPECS, assert_same_bytes, make_weight, reference_with_offset

CODEBOOK = pytest.mark.parametrize("codebook", CODEBOOKS)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.codebook}-{s.block_size}-{s.double_quant:d}")


def unpack(q: QuantizedTensor) -> torch.Tensor:
    return torch.stack([q.packed >> 4, q.packed & 15], dim=1).view(-1)[: q.numel].long()


@SPEC
@DTYPE
def test_quantize_4bit_equals_reference(spec: QuantSpec, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = make_weight(shape, dtype, seed=seed)
        assert_same_bytes(quantize_4bit_reference(weight, spec), quantize_4bit(weight, spec))


@DTYPE
def test_quantize_4bit_equals_reference_over_many_chunks(dtype: torch.dtype) -> None:
    weight = make_weight((421, 1031), dtype)
    for codebook, block_size in (("nf4", 64), ("nf4", 4096), ("fp4", 32)):
        spec = QuantSpec(codebook=codebook, block_size=block_size)
        assert_same_bytes(quantize_4bit_reference(weight, spec), quantize_4bit(weight, spec))


@CODEBOOK
def test_quantize_4bit_takes_the_nearest_code(codebook: str) -> None:
    weight = torch.cat([torch.linspace(-1, 1, 65_535), torch.ones(1)])
    q = quantize_4bit(weight, QuantSpec(codebook=codebook, block_size=4096, double_quant=False))
    absmax = q.absmax.repeat_interleave(4096)
    distance = (weight.double()[:, None] - absmax.double()[:, None] * codebook_values(codebook).double()).abs()
    taken = distance.gather(1, unpack(q)[:, None])[:, 0]
    # Thresholds are midpoints rounded to fp32, and so is x / absmax.
    assert (taken <= distance.amin(dim=1) + absmax * 2.0**-22).all()


@CODEBOOK
def test_quantize_4bit_gives_ties_to_the_lower_code(codebook: str) -> None:
    for neighbour in (-torch.inf, None, torch.inf):
        x = thresholds(codebook)
        if neighbour is not None:
            x = x.nextafter(torch.full_like(x, neighbour))
        weight = torch.nn.functional.pad(torch.cat([x, torch.ones(1)]), (0, 16))
        q = quantize_4bit(weight, QuantSpec(codebook=codebook, block_size=32))
        places = torch.arange(15) + (neighbour == torch.inf)
        assert torch.equal(unpack(q)[:15], sorted_codes(codebook)[places].long())


@CODEBOOK
def test_quantize_4bit_of_zeros_restores_zeros(codebook: str) -> None:
    for shape in ((64,), (63,), (130, 64)):
        q = quantize_4bit(torch.zeros(shape), QuantSpec(codebook=codebook))
        assert set(unpack(q).tolist()) == {7 if codebook == "nf4" else 0}
        assert torch.equal(dequantize_4bit(q), torch.zeros(shape))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("numel", [256, 200])
def test_quantize_4bit_does_not_hide_what_is_not_finite(bad: float, numel: int) -> None:
    weight = torch.randn(numel)
    weight[70] = bad
    for quantize in (quantize_4bit, quantize_4bit_reference):
        restored = dequantize_4bit(quantize(weight, QuantSpec(double_quant=False)))
        assert not restored[64:128].isfinite().any()
        assert restored[:64].isfinite().all()
        assert restored[128:].isfinite().all()


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    exponent=st.integers(-140, 120),
    spec=st.sampled_from(SPECS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_quantize_4bit_error_is_bounded(
    shape: list[int], exponent: int, spec: QuantSpec, dtype: torch.dtype, seed: int
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight = values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    q = quantize_4bit(weight, spec)
    assert_same_bytes(quantize_4bit_reference(weight, spec), q)
    single = quantize_4bit(weight, QuantSpec(codebook=spec.codebook, block_size=spec.block_size, double_quant=False))
    assert torch.equal(single.packed, q.packed)
    ascending = codebook_values(spec.codebook)[sorted_codes(spec.codebook)]
    half_gap = ascending.diff().max() / 2
    largest = single.absmax.repeat_interleave(spec.block_size)[: weight.numel()].view(weight.shape)
    error = (dequantize_4bit(single, dtype=torch.float32) - weight.float()).abs()
    # Below 1e-38 the reciprocal is held back and every element may become 0.
    assert (error <= (half_gap * 1.0001 * largest).clamp(min=1e-38)).all()


@given(exponent=st.integers(-100, 100), seed=st.integers(0, 2**32 - 1), codebook=st.sampled_from(CODEBOOKS))
@settings(deadline=None, max_examples=50)
def test_quantize_4bit_codes_do_not_depend_on_a_power_of_two(exponent: int, seed: int, codebook: str) -> None:
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(seed))
    q, scaled = (quantize_4bit(w, QuantSpec(codebook=codebook)) for w in (weight, weight * 2.0**exponent))
    assert torch.equal(q.packed, scaled.packed)
    assert torch.equal(q.absmax, scaled.absmax)


@SPEC
def test_quantize_4bit_of_a_restored_weight_gives_the_same_codes(spec: QuantSpec) -> None:
    single = QuantSpec(codebook=spec.codebook, block_size=spec.block_size, double_quant=False)
    q = quantize_4bit(torch.randn(77, 129), single)
    again = quantize_4bit(dequantize_4bit(q), single)
    assert torch.equal(codebook_values(spec.codebook)[unpack(q)], codebook_values(spec.codebook)[unpack(again)])


FIGURES = [
    ("nf4", 32, False, 0.0873),
    ("nf4", 64, False, 0.09196),
    ("nf4", 128, False, 0.0956),
    ("nf4", 256, False, 0.0987),
    ("nf4", 64, True, 0.09198),
    ("fp4", 64, False, 0.1220),
    ("fp4", 64, True, 0.1220),
]


@pytest.mark.parametrize(("codebook", "block_size", "double_quant", "expected"), FIGURES)
def test_quantize_4bit_reproduces_the_known_errors(
    codebook: str, block_size: int, double_quant: bool, expected: float
) -> None:
    weight = torch.randn(1 << 20)
    q = quantize_4bit(weight, QuantSpec(codebook=codebook, block_size=block_size, double_quant=double_quant))
    error = (dequantize_4bit(q) - weight).norm() / weight.norm()
    # A million numbers have a relative spread of about 0.07%; the figures are given to three or four digits.
    assert error.item() == pytest.approx(expected, rel=3e-3)


def test_quantize_4bit_absmax_error_is_the_known_one() -> None:
    weight = torch.randn(1 << 20)
    exact = quantize_4bit(weight, QuantSpec(double_quant=False)).absmax
    error = (restore_absmax_reference(quantize_4bit(weight, QuantSpec())) - exact).abs()
    assert (error.mean() / exact.mean()).item() == pytest.approx(0.00155, rel=0.05)


def test_quantize_4bit_takes_views_and_changes_nothing() -> None:
    weight = torch.randn(96, 130)
    before = weight.clone()
    assert_same_bytes(
        quantize_4bit(weight[:, 1:129].contiguous().t().contiguous(), QuantSpec()),
        quantize_4bit(weight[:, 1:129].t(), QuantSpec()),
    )
    assert torch.equal(weight, before)
    parameter = torch.nn.Parameter(weight)
    assert not quantize_4bit(parameter, QuantSpec()).packed.requires_grad


@pytest.mark.parametrize("weight", [torch.zeros(0, 4), torch.zeros(4, dtype=torch.int64), torch.zeros(4).double()])
def test_quantize_4bit_refuses_what_it_cannot_quantise(weight: torch.Tensor) -> None:
    for quantize in (quantize_4bit, quantize_4bit_reference):
        with pytest.raises(ConfigError, match="cannot quantise"):
            quantize(weight, QuantSpec())


def test_quantize_4bit_refuses_a_backend_that_cannot_run() -> None:
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        quantize_4bit(torch.ones(4), QuantSpec(), backend="triton")
    with pytest.raises(BackendError, match="auto, torch, triton"):
        quantize_4bit(torch.ones(4), QuantSpec(), backend="cuda")
    with pytest.raises(BackendError, match="meta"):
        quantize_4bit(torch.ones(4, device="meta"), QuantSpec())


GPU_LAUNCHES = [
    QuantizeLaunch(search=search, elements_per_program=elements, num_warps=num_warps)
    for search in ("bins", "tree")
    for elements, num_warps in ((1024, 4), (4096, 4), (8192, 8))
]


@pytest.mark.gpu
@SPEC
@DTYPE
def test_quantize_4bit_on_a_gpu_gives_the_reference_bytes(spec: QuantSpec, dtype: torch.dtype) -> None:
    for seed, shape in enumerate([(65, 63), (1031, 640)]):
        weight = make_weight(shape, dtype, device="cuda", seed=seed)
        q = quantize_4bit(weight, spec)
        assert_same_bytes(reference_with_offset(weight, spec, q), q)


@pytest.mark.gpu
@pytest.mark.parametrize("launch", GPU_LAUNCHES, ids=str)
@DTYPE
def test_quantize_4bit_on_a_gpu_gives_the_same_bytes_however_launched(
    launch: QuantizeLaunch, dtype: torch.dtype
) -> None:
    for seed, shape in enumerate((*SHAPES, (300, 4096))):
        weight = make_weight(shape, dtype, device="cuda", seed=seed)
        q = quantize_4bit_triton(weight, QuantSpec(), launch=launch)
        assert_same_bytes(reference_with_offset(weight, QuantSpec(), q), q)


@pytest.mark.gpu
def test_quantize_4bit_on_a_gpu_decides_at_the_thresholds_as_the_reference() -> None:
    x = thresholds("nf4")
    near = torch.cat([x, x.nextafter(torch.full_like(x, 9.0)), x.nextafter(torch.full_like(x, -9.0)), torch.ones(19)])
    for search in ("bins", "tree"):
        q = quantize_4bit_triton(near.cuda(), QuantSpec(), launch=QuantizeLaunch(search=search))
        assert torch.equal(q.packed.cpu(), quantize_4bit_reference(near, QuantSpec()).packed)


@pytest.mark.gpu
def test_quantize_4bit_on_a_gpu_addresses_more_than_32_bits() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a GPU of 24 GiB: 2^31 numbers in 16 bits are 4 GiB, and they are held three times")
    pattern = torch.randn(1 << 20, device="cuda", dtype=torch.bfloat16)
    weight = pattern.repeat((1 << 11) + 2)
    expected = quantize_4bit(pattern, QuantSpec(double_quant=False))
    q = quantize_4bit(weight, QuantSpec(double_quant=False))
    assert torch.equal(q.packed.view(-1, pattern.numel() // 2)[-3:], expected.packed.expand(3, -1))
    restored = dequantize_4bit(q).view(-1, pattern.numel())[-3:]
    assert torch.equal(restored, dequantize_4bit(expected).expand(3, -1))
