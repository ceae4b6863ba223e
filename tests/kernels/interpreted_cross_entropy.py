"""The Triton kernel of the loss under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.cross_entropy import CrossEntropyLaunch
from tests.ops.cross_entropy_cases import (
    OPTIONS,
    SHAPES,
    KernelCase,
    check_kernel,
    check_kernel_far_into_the_softcap,
    check_kernel_on_bad_rows,
)
from tests.ops.fused_cases import Place
from tests.ops.test_cross_entropy import VARIANTS, check_against_fp64, check_padding

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def interpreted(dtype: torch.dtype, spare: int = 16) -> Place:
    # To bf16 the interpreter cuts off, up to twice the error of a rounding.
    return Place("triton", "cpu", roundings=2 if dtype == torch.bfloat16 else 1, spare=spare)


@DTYPE
@OPTION
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_cross_entropy_kernel_matches_fp64(bias: bool, options: dict[str, float], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check_kernel(KernelCase(shape=shape, dtype=dtype, place=interpreted(dtype), bias=bias, **options))


@DTYPE
@pytest.mark.parametrize("size", [0.0, 1e4], ids=["equal", "large"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_cross_entropy_kernel_matches_fp64_at_equal_and_large_logits(
    scale: float, size: float, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        check_kernel(KernelCase(shape=shape, dtype=dtype, place=interpreted(dtype), size=size, scale=scale))


@DTYPE
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("launch", [CrossEntropyLaunch(), CrossEntropyLaunch(num_warps=4, accesses_per_thread=1)])
def test_cross_entropy_kernel_may_be_launched_otherwise(
    launch: CrossEntropyLaunch, spare: int, dtype: torch.dtype
) -> None:
    for shape in ((2, 3), (2, 9000)):
        place = interpreted(dtype, spare)
        check_kernel(KernelCase(shape=shape, dtype=dtype, place=place, softcap=10.0, bias=True, launch=launch))


def test_cross_entropy_kernel_far_into_the_softcap() -> None:
    check_kernel_far_into_the_softcap(interpreted(torch.float32))


def test_cross_entropy_kernel_on_bad_rows() -> None:
    check_kernel_on_bad_rows(interpreted(torch.float32))


@DTYPE
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_chunked_cross_entropy_by_the_kernel_matches_fp64(options: dict[str, float], dtype: torch.dtype) -> None:
    check_against_fp64(dtype, "uneven", options, backend="triton", cut_off=dtype == torch.bfloat16)


def test_chunked_cross_entropy_by_the_kernel_ignores_padding() -> None:
    check_padding("triton", "cpu")
