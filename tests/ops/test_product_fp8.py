"""product_fp8 against fp64."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.e4m3 import FP8, why_no_fp8
from halfbyte.ops.product_fp8 import product_fp8
from tests.oracles import assert_close, relative_rms


def make_factors(T: int, K: int, N: int, device: str) -> tuple[torch.Tensor, ...]:
    a, b = (torch.randn(rows, K, device=device).mul_(50).clamp_(-448, 448).to(FP8) for rows in (T, N))
    scales = (torch.exp2(torch.randint(-9, 9, (rows,), device=device).float()) for rows in (T, N))
    return a, b, *scales


def exact_product(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double().T) * scale_a.double()[:, None] * scale_b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_fp8_is_rounded_once(dtype: torch.dtype) -> None:
    a, b, scale_a, scale_b = make_factors(24, 64, 48, "cpu")
    out = torch.empty(24, 48, dtype=dtype)
    assert product_fp8(a, b, scale_a_T=scale_a, scale_b_N=scale_b, out=out) is out
    assert_close("y", exact_product(a, b, scale_a, scale_b), out, dtype=dtype, roundings=1, reduction_length=64)


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True], ids=["", "fast"])
@pytest.mark.parametrize("shape", [(24, 64, 48), (33, 624, 576), (4096, 4240, 4096), (1000, 12288, 4096)], ids=str)
def test_product_fp8_on_a_gpu(shape: tuple[int, int, int], fast: bool) -> None:
    a, b, scale_a, scale_b = make_factors(*shape, "cuda")
    out = torch.empty(shape[0], shape[2], dtype=torch.bfloat16, device="cuda")
    product_fp8(a, b, scale_a_T=scale_a, scale_b_N=scale_b, out=out, fast_accumulation=fast)
    exact = exact_product(a, b, scale_a, scale_b)
    # Of each row: their scales lie far apart. Sums in tensor cores keep some 14 bits.
    errors = [relative_rms(e, y) for e, y in zip(exact[:64] / scale_b, out[:64].double() / scale_b, strict=True)]
    assert max(errors) < (2.0**-4 if fast else 2.0**-6), max(errors)


def test_cpu_multiplies_no_fp8() -> None:
    assert why_no_fp8(torch.device("cpu")) == "CPUs multiply no fp8"


@pytest.mark.gpu
def test_gpu_multiplies_fp8_from_ada_on() -> None:
    has_fp8 = torch.cuda.get_device_capability() >= (8, 9)
    assert (why_no_fp8(torch.device("cuda", 0)) is None) == has_fp8
