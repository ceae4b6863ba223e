"""The Triton kernels on fp8 under Triton's interpreter, in their own process."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.e4m3 import encode_function, inverse_function, round_function, scale_function
from halfbyte.ops.e4m3 import encode, scale_of
from halfbyte.quant import QuantSpec
from tests.ops.fp8_cases import check_adapter_columns, check_dequantize, check_quantize_rows

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def test_rounding_is_torchs() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, code_ptr, rounded_ptr, ENCODE: tl.constexpr, ROUND: tl.constexpr, SIZE: tl.constexpr):
        place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        x = tl.load(x_ptr + place)
        tl.store(code_ptr + place, ENCODE(x, False))
        tl.store(rounded_ptr + place, ROUND(x))

    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    e4m3 = e4m3[e4m3.isfinite()].sort().values
    middle = (e4m3[1:] + e4m3[:-1]) / 2
    up = torch.full((1,), torch.inf)
    x = torch.cat([e4m3, middle, middle.nextafter(up), middle.nextafter(-up), torch.randn(4096) * 100])
    x = torch.cat([x, torch.randn(4096) * 1e-2, torch.randn(8192 - x.numel() % 4096) * 1e-6])
    x = x[: x.numel() // 1024 * 1024].clamp(-448, 448)
    codes, rounded = torch.empty(x.numel(), dtype=torch.uint8), torch.empty_like(x)
    kernel[(x.numel() // 1024,)](x, codes, rounded, ENCODE=encode_function(), ROUND=round_function(), SIZE=1024)
    assert codes.view(torch.float8_e4m3fn).float().equal(encode(x).float())
    assert rounded.equal(encode(x).float())


def test_scales_are_the_smallest_powers_of_two_that_fit() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, scale_ptr, inverse_ptr, SCALE: tl.constexpr, INVERSE: tl.constexpr, SIZE: tl.constexpr):
        place = tl.arange(0, SIZE)
        scale = SCALE(tl.load(x_ptr + place))
        tl.store(scale_ptr + place, scale)
        tl.store(inverse_ptr + place, INVERSE(scale))

    edges = 448 * torch.exp2(torch.arange(-40, 24).float())
    up = torch.full((1,), torch.inf)
    x = torch.cat([edges, edges.nextafter(up), edges.nextafter(-up), torch.zeros(1), torch.rand(63)])
    scale, inverse = torch.empty_like(x), torch.empty_like(x)
    kernel[(1,)](x, scale, inverse, SCALE=scale_function(), INVERSE=inverse_function(), SIZE=256)
    assert scale.equal(scale_of(x))
    assert (scale * inverse == 1).all()
    assert (x <= 448 * scale).all()
    assert ((x > 224 * scale) | (x == 0)).all()
    assert scale.frexp().mantissa.eq(0.5).all()


@DTYPE
@pytest.mark.parametrize("ranks", [0, 16, 48])
@pytest.mark.parametrize("factor", [False, True], ids=["", "factors"])
def test_quantize_rows_kernel_is_its_definition(dtype: torch.dtype, ranks: int, factor: bool) -> None:
    for shape in ((3, 64), (5, 576), (2, 1000), (2, 40000)):
        check_quantize_rows(shape, dtype, ranks=ranks, factor=factor, backend="triton", device="cpu")


@DTYPE
def test_adapter_columns_kernel_is_its_definition(dtype: torch.dtype) -> None:
    for shape in ((48, 16), (70, 32), (33, 48)):
        check_adapter_columns(shape, dtype, backend="triton", device="cpu")


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_dequantize_fp8_kernels_are_their_definition(codebook: str, double_quant: bool, block_size: int) -> None:
    spec = QuantSpec(codebook=codebook, block_size=block_size, double_quant=double_quant)
    for shape, spare in (((16, 64), 0), ((144, 192), 16), ((48, 80), 4), ((272, 320), 32)):
        check_dequantize(shape, spec, spare=spare, larger_scales=spare == 16, backend="triton", device="cpu")
