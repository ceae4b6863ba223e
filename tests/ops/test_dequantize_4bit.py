from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import BackendError
from halfbyte.kernels.dequantize_4bit import DequantizeLaunch
from halfbyte.ops import Workspace, dequantize_4bit, dequantize_4bit_reference, quantize_4bit
from halfbyte.ops.dequantize_4bit import dequantize_4bit_triton, restore_absmax_reference
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.codebooks import codebook_values, dynamic_map
from halfbyte.quant.tensor import CODEBOOKS
from tests.ops.quantize_cases import DTYPES, SHAPES, SPECS, assert_same_numbers, make_weight

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.codebook}-{s.block_size}-{s.double_quant:d}")


@SPEC
@DTYPE
def test_dequantize_4bit_equals_reference(spec: QuantSpec, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        q = quantize_4bit(make_weight(shape, torch.float32, seed=seed), spec)
        expected = dequantize_4bit_reference(q, dtype=dtype)
        assert_same_numbers(expected, dequantize_4bit(q, dtype=dtype))
        assert_same_numbers(expected, dequantize_4bit_reference(q, out=torch.empty(shape, dtype=dtype)))


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_dequantize_4bit_restores_every_byte(codebook: str) -> None:
    absmax = torch.tensor([0.75, 3.0, 1e-3, 1e4, 0.0, 1e-40, 1.0, 1e30])
    q = QuantizedTensor(
        packed=torch.arange(256, dtype=torch.uint8), absmax=absmax, codebook=codebook, shape=(512,), dtype=torch.float32
    )
    values = [float(v) for v in codebook_values(codebook)]
    expected = torch.tensor([values[code] for byte in range(256) for code in (byte >> 4, byte & 15)])
    expected *= absmax.repeat_interleave(64)
    assert torch.equal(dequantize_4bit(q), expected)
    assert torch.equal(dequantize_4bit_reference(q), expected)


def test_dequantize_4bit_rounds_the_second_level_twice() -> None:
    q = quantize_4bit(torch.randn(500, 64), QuantSpec())
    assert q.absmax_scale is not None
    assert q.absmax_offset is not None
    product = torch.zeros(q.absmax.shape)
    for group, scale in enumerate(q.absmax_scale):
        part = slice(group * 256, group * 256 + 256)
        product[part] = dequantize_absmax_codes(q.absmax[part]) * scale
    assert torch.equal(restore_absmax_reference(q), product + q.absmax_offset)


def dequantize_absmax_codes(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([dynamic_map(True)[int(code)] for code in codes])


@DTYPE
@pytest.mark.parametrize("shape", [(1,), (63,), (70, 96), (71, 37), (700, 501)])
def test_dequantize_4bit_fills_the_buffer_given(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q = quantize_4bit(torch.randn(shape), QuantSpec())
    expected = dequantize_4bit(q, dtype=dtype)
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert dequantize_4bit(q, out=out) is out
    assert torch.equal(out, expected)
    if len(shape) == 2:
        wide = torch.full((shape[0], shape[1] + 16), torch.nan, dtype=dtype)
        dequantize_4bit(q, out=wide[:, : shape[1]])
        assert torch.equal(wide[:, : shape[1]], expected)
        assert wide[:, shape[1] :].isnan().all()


def test_dequantize_4bit_reuses_a_workspace() -> None:
    workspace = Workspace()
    weights = [torch.randn(1000, 321), torch.randn(7), torch.randn(300, 256)]
    for _ in range(2):
        for weight, dtype in itertools.product(weights, DTYPES):
            q = quantize_4bit(weight, QuantSpec())
            expected = dequantize_4bit_reference(q, dtype=dtype)
            assert torch.equal(dequantize_4bit(q, dtype=dtype, workspace=workspace), expected)
    # An index of 8 bytes and two values of 4 for each packed byte of the largest chunk.
    assert workspace.nbytes <= 8 * 1000 * 321 + 8 * 64


def test_dequantize_4bit_takes_the_dtype_of_the_weight() -> None:
    for dtype in DTYPES:
        assert dequantize_4bit(quantize_4bit(torch.randn(5, 64).to(dtype), QuantSpec())).dtype == dtype


@given(
    shape=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    spec=st.sampled_from(SPECS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_dequantize_4bit_equals_reference_on_any_bytes(
    shape: list[int], spec: QuantSpec, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = quantize_4bit(torch.randn(shape, generator=generator), spec)
    noise = torch.randint(0, 256, q.packed.shape, dtype=torch.uint8, generator=generator)
    q = dataclasses.replace(q, packed=noise)
    assert torch.equal(dequantize_4bit(q, dtype=dtype), dequantize_4bit_reference(q, dtype=dtype))


def test_dequantize_4bit_refuses_a_backend_that_cannot_run() -> None:
    q = quantize_4bit(torch.randn(64), QuantSpec())
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        dequantize_4bit(q, backend="triton")
    with pytest.raises(BackendError, match="auto, torch, triton"):
        dequantize_4bit(q, backend="cuda")


GPU_LAUNCHES = [
    DequantizeLaunch(lookup=lookup, elements_per_program=elements, num_warps=num_warps)
    for lookup in ("codes", "pairs")
    for elements, num_warps in ((2048, 4), (8192, 8), (16384, 4))
]


def fill(
    q: QuantizedTensor, dtype: torch.dtype, launch: DequantizeLaunch, *, spare_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernel wrote into a buffer that was NaN, and the columns that it must not have touched."""
    if not spare_columns:
        out = torch.full(q.shape, torch.nan, dtype=dtype, device="cuda")
        return dequantize_4bit_triton(q, out, launch=launch), out[:0]
    buffer = torch.full((q.shape[0], q.shape[1] + spare_columns), torch.nan, dtype=dtype, device="cuda")
    return dequantize_4bit_triton(q, buffer[:, : q.shape[1]], launch=launch), buffer[:, q.shape[1] :]


@pytest.mark.gpu
@SPEC
@DTYPE
def test_dequantize_4bit_on_a_gpu_equals_the_reference(spec: QuantSpec, dtype: torch.dtype) -> None:
    for seed, shape in enumerate([(65, 63), (1031, 640)]):
        q = quantize_4bit(make_weight(shape, torch.float32, seed=seed), spec)
        assert_same_numbers(dequantize_4bit_reference(q, dtype=dtype), dequantize_4bit(q.to("cuda"), dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("launch", GPU_LAUNCHES, ids=str)
@DTYPE
def test_dequantize_4bit_on_a_gpu_equals_the_reference_however_launched(
    launch: DequantizeLaunch, dtype: torch.dtype
) -> None:
    for seed, shape in enumerate((*SHAPES, (300, 4096), (128, 192))):
        q = quantize_4bit(make_weight(shape, torch.float32, seed=seed), QuantSpec())
        expected = dequantize_4bit_reference(q, dtype=dtype)
        for spare in (0, 16, 5) if len(shape) == 2 else (0,):
            written, untouched = fill(q.to("cuda"), dtype, launch, spare_columns=spare)
            assert_same_numbers(expected, written)
            assert untouched.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_dequantize_4bit_on_a_gpu_with_rounded_pairs_is_near(dtype: torch.dtype, codebook: str) -> None:
    q = quantize_4bit(torch.randn(513, 640), QuantSpec(codebook=codebook))
    expected = dequantize_4bit_reference(q, dtype=dtype)
    written, _ = fill(q.to("cuda"), dtype, DequantizeLaunch(lookup="rounded"), spare_columns=16)
    steps = (expected.view(torch.int16).int() - written.cpu().contiguous().view(torch.int16).int()).abs()
    assert steps.max() <= 1
