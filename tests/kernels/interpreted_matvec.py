"""The Triton kernel of matvec_4bit under Triton's interpreter, run in a process of its own."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.matvec_4bit import MatvecLaunch
from halfbyte.ops.matvec_4bit import matvec_4bit_triton
from halfbyte.quant import QuantSpec
from tests.ops.matvec_cases import check_matvec_group, make_matvec_case
from tests.oracles import assert_close

LAUNCH = MatvecLaunch(lookup="codes", rows_per_program=4, num_warps=1)
# Short and whole tiles of rows and of chunks; more than one group of the second level.
CASES = [
    (1, (1, 64), QuantSpec()),
    (1, (7, 128), QuantSpec(codebook="fp4", block_size=32)),
    (2, (8, 576), QuantSpec(double_quant=False)),
    (5, (70, 256), QuantSpec(block_size=32)),
    (8, (3, 384), QuantSpec(block_size=128)),
    (1, (2, 4096), QuantSpec(codebook="fp4", block_size=4096)),
]


@pytest.mark.parametrize("with_terms", [False, True], ids=["plain", "terms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "shape", "spec"), CASES)
def test_matvec_4bit_kernel_matches_fp64(
    tokens: int, shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype, with_terms: bool
) -> None:
    case = make_matvec_case(tokens, shape, spec, dtype, with_terms=with_terms)
    y = matvec_4bit_triton(case.x, case.q, case.bias, add=case.add, launch=LAUNCH)
    assert y.dtype == dtype
    # To bf16 the interpreter cuts off, up to twice the error of a rounding.
    roundings = 2 if dtype == torch.bfloat16 else 1
    assert_close("y", case.exact(), y, dtype=dtype, roundings=roundings, reduction_length=shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("widths", [(9,), (8, 5), (3, 16, 6)], ids=str)
def test_matvec_4bit_kernel_multiplies_a_group(widths: tuple[int, ...], tokens: int, dtype: torch.dtype) -> None:
    roundings = 2 if dtype == torch.bfloat16 else 1
    for ranks in ((0, 0, 0), (4, 0, 3), (1, 1, 1)):
        check_matvec_group(tokens, widths, ranks[: len(widths)], 192, dtype, launch=LAUNCH, roundings=roundings)
