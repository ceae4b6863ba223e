"""swiglu against autograd in fp64; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from halfbyte.ops.counter_dropout import CounterDropout
from halfbyte.ops.swiglu import swiglu, swiglu_backward_
from tests.ops.fused_cases import DROPOUT, Place, check_swiglu

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
PRODUCT = pytest.mark.parametrize("product", ["none", "new", "adapter"])


@DTYPE
@PRODUCT
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("adapter", [False, True], ids=["together", "apart"])
def test_swiglu_and_its_gradients_match_autograd(
    adapter: bool, dropout: CounterDropout | None, product: str, dtype: torch.dtype
) -> None:
    for shape in ((1, 1), (5, 64), (7, 33)):
        check_swiglu(shape, dtype, Place(), dropout=dropout, adapter=adapter, product=product)


def test_swiglu_in_fp64_is_exact() -> None:
    check_swiglu((5, 64), torch.float64, Place(), dropout=DROPOUT, adapter=True, product="adapter")


@pytest.mark.parametrize("gate", [-1e4, -90.0, 90.0, 1e4])
def test_swiglu_stays_finite_far_from_zero(gate: float) -> None:
    assert_finite_far_from_zero(gate, "torch", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [-1e4, -90.0, 90.0, 1e4])
def test_swiglu_kernel_on_a_gpu_stays_finite_far_from_zero(gate: float) -> None:
    assert_finite_far_from_zero(gate, "triton", "cuda")


def assert_finite_far_from_zero(gate: float, backend: str, device: str) -> None:
    gate_up = torch.tensor([[gate, 2.0]], device=device)
    one = torch.ones(1, 1, device=device)
    product = swiglu(gate_up, out_TF=torch.empty(1, 1, device=device), backend=backend)
    assert product.item() == pytest.approx(max(gate, 0) * 2)
    grad = swiglu_backward_(gate_up, one, backend=backend)
    assert grad.tolist()[0] == pytest.approx([2.0, gate] if gate > 0 else [0.0, 0.0])


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (33, 576), (17, 4096), (3, 11008), (1000, 1536)])
@pytest.mark.parametrize("spare", [0, 5, 8, 16, 4096])
def test_swiglu_kernel_on_a_gpu_matches_autograd(spare: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    place = Place("triton", "cuda", spare=spare)
    for dropout, adapter, product in itertools.product((None, DROPOUT), (False, True), ("none", "new", "adapter")):
        check_swiglu(shape, dtype, place, dropout=dropout, adapter=adapter, product=product)
