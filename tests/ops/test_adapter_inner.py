"""adapter_inner against fp64; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.counter_dropout import CounterDropout
from tests.ops.fused_cases import DROPOUT, Place, check_adapter_inner

DROPOUTS = pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["no dropout", "dropout"])


@DROPOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_adapter_inner_is_the_product(dtype: torch.dtype, dropout: CounterDropout | None) -> None:
    for shape, ranks in (((1, 7), 1), ((5, 64), 16), ((33, 300), 48)):
        check_adapter_inner(shape, ranks, dtype, Place(), dropout=dropout)


@pytest.mark.gpu
@DROPOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spare", [0, 5, 16, 48])
def test_adapter_inner_kernel_on_a_gpu(spare: int, dtype: torch.dtype, dropout: CounterDropout | None) -> None:
    for shape, ranks in (((1, 7), 1), ((33, 576), 16), ((4096, 4096), 48), ((100, 11008), 16), ((70, 200), 200)):
        check_adapter_inner(shape, ranks, dtype, Place("triton", "cuda", spare=spare), dropout=dropout)
