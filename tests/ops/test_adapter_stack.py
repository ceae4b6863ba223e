"""stack_adapters: every number in its place; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.fused_cases import Place, check_stack_adapters

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
GROUP = pytest.mark.parametrize(
    ("rows", "ranks"), [((70,), (4,)), ((48, 32, 16), (4, 0, 8)), ((130, 5, 64), (16, 16, 16)), ((9, 9), (0, 2))]
)


@DTYPE
@GROUP
def test_stack_adapters_puts_each_in_its_place(
    rows: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_stack_adapters(70, rows, ranks, dtype, Place())


@pytest.mark.gpu
@DTYPE
@GROUP
@pytest.mark.parametrize("spare", [0, 5, 4096])
def test_stack_adapters_kernel_on_a_gpu(
    spare: int, rows: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    for width in (70, 4096):
        check_stack_adapters(width, rows, ranks, dtype, Place("triton", "cuda", spare=spare))
