"""rms_norm against autograd in fp64; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import BackendError
from halfbyte.ops.counter_dropout import CounterDropout
from halfbyte.ops.rms_norm import rms_norm
from tests.ops.fused_cases import DROPOUT, EPS, Place, check_rms_norm

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPE = pytest.mark.parametrize("shape", [(5, 64), (33, 576), (17, 4096), (3, 11008), (7, 9, 64), (9, 32, 128)])


@DTYPE
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("adapter", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (6, 3, 10)])
def test_rms_norm_and_its_gradient_match_autograd(
    shape: tuple[int, ...], residual: bool, adapter: bool, dropout: CounterDropout | None, dtype: torch.dtype
) -> None:
    for addend in (False, True):
        check_rms_norm(shape, dtype, Place(), dropout=dropout, residual=residual, adapter=adapter, addend=addend)


@DTYPE
@pytest.mark.parametrize("out", ["x", "grad_y", "residual"])
def test_rms_norm_may_overwrite_what_it_reads(out: str, dtype: torch.dtype) -> None:
    for shape in ((5, 64), (6, 3, 10)):
        check_rms_norm(shape, dtype, Place(), dropout=DROPOUT, residual=True, adapter=True, out=out)


def test_rms_norm_backward_in_fp64_is_exact() -> None:
    check_rms_norm((5, 64), torch.float64, Place(), dropout=DROPOUT, residual=True, adapter=True)


def test_rms_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 8)
    r = rms_norm(x, torch.ones(8), eps=EPS, out=x)
    assert r.tolist() == pytest.approx([EPS**-0.5] * 2)
    assert not x.any()


def test_rms_norm_says_why_a_kernel_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="rms_norm cannot run on cpu"):
        rms_norm(torch.zeros(2, 8), torch.ones(8), eps=EPS, out=torch.zeros(2, 8), backend="triton")


@pytest.mark.gpu
@DTYPE
@SHAPE
@pytest.mark.parametrize("spare", [0, 5, 8, 16, 4096])
def test_rms_norm_kernel_on_a_gpu_matches_autograd(spare: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    place = Place("triton", "cuda", spare=spare)
    check_rms_norm(shape, dtype, place)
    check_rms_norm(shape, dtype, place, residual=True)
    check_rms_norm(shape, dtype, place, adapter=True, addend=True)
    check_rms_norm(shape, dtype, place, dropout=DROPOUT, residual=True, adapter=True)
    for out in ("x", "grad_y", "residual"):
        check_rms_norm(shape, dtype, place, dropout=DROPOUT, residual=True, adapter=True, out=out)


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("shape", [(1, 7), (1000, 8192), (5, 16384), (5, 20000), (3000, 3, 128)])
def test_rms_norm_kernel_on_a_gpu_takes_rows_of_any_width(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for out in ("x", "grad_y", "residual"):
        place = Place("triton", "cuda")
        check_rms_norm(shape, dtype, place, dropout=DROPOUT, residual=True, adapter=True, out=out)
        check_rms_norm(shape, dtype, place, dropout=DROPOUT, addend=True, out=out)
