"""The Triton kernels of the fused block's elementwise operations under Triton's interpreter, in their own process."""

from __future__ import annotations

import itertools

import pytest
import torch

from halfbyte.kernels.counter_dropout import columns_per_program, dropout_arguments, keep_function
from halfbyte.ops.counter_dropout import MASK_32, CounterDropout, drop_copy, keep_mask_reference
from tests.ops.fused_cases import (
    DROPOUT,
    Place,
    check_adapter_inner,
    check_rms_norm,
    check_rotate,
    check_stack_adapters,
    check_swiglu,
)
from tests.ops.test_counter_dropout import check_drop_copy

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SPARE = pytest.mark.parametrize("spare", [5, 16])
DROPOUTS = pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["no dropout", "dropout"])


def interpreted(dtype: torch.dtype, spare: int = 16) -> Place:
    # To bf16 the interpreter cuts off, up to twice the error of a rounding.
    return Place("triton", "cpu", roundings=2 if dtype == torch.bfloat16 else 1, spare=spare)


@DTYPE
@SPARE
@DROPOUTS
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (5, 576), (1, 11008), (7, 9, 64), (2, 20000)])
def test_rms_norm_kernels_match_autograd(
    shape: tuple[int, ...], dropout: CounterDropout | None, spare: int, dtype: torch.dtype
) -> None:
    place = interpreted(dtype, spare)
    for residual, adapter in itertools.product((False, True), (False, True)):
        check_rms_norm(shape, dtype, place, dropout=dropout, residual=residual, adapter=adapter, addend=adapter)


@DTYPE
@pytest.mark.parametrize("out", ["x", "grad_y", "residual"])
def test_rms_norm_kernels_may_overwrite_what_they_read(out: str, dtype: torch.dtype) -> None:
    for shape in ((5, 576), (7, 9, 64), (2, 20000)):
        check_rms_norm(shape, dtype, interpreted(dtype), dropout=DROPOUT, residual=True, adapter=True, out=out)


@DTYPE
@SPARE
@DROPOUTS
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (2, 1100)])
def test_swiglu_kernels_match_autograd(
    shape: tuple[int, int], dropout: CounterDropout | None, spare: int, dtype: torch.dtype
) -> None:
    for adapter, product in itertools.product((False, True), ("none", "new", "adapter")):
        check_swiglu(shape, dtype, interpreted(dtype, spare), dropout=dropout, adapter=adapter, product=product)


@DTYPE
@SPARE
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 9, 64), (33, 8, 128), (5, 3, 80)])
def test_rotate_kernel_matches_autograd(shape: tuple[int, int, int], spare: int, dtype: torch.dtype) -> None:
    for angle_dtype in (None, torch.float32):
        check_rotate(shape, dtype, interpreted(dtype, spare), angle_dtype=angle_dtype)


@DTYPE
@SPARE
def test_counter_dropout_kernels(spare: int, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (5, 64), (2, 1100)):
        check_drop_copy(shape, dtype, interpreted(dtype, spare))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@DROPOUTS
def test_adapter_inner_kernel(dropout: CounterDropout | None, dtype: torch.dtype) -> None:
    for shape, ranks in (((1, 7), 1), ((5, 64), 16), ((33, 300), 48), ((70, 130), 17)):
        check_adapter_inner(shape, ranks, dtype, interpreted(dtype), dropout=dropout)


@DTYPE
@SPARE
@pytest.mark.parametrize(("rows", "ranks"), [((70,), (4,)), ((48, 32, 16), (4, 0, 8)), ((130, 5, 64), (16, 16, 16))])
def test_stack_adapters_kernel(rows: tuple[int, ...], ranks: tuple[int, ...], spare: int, dtype: torch.dtype) -> None:
    check_stack_adapters(70, rows, ranks, dtype, interpreted(dtype, spare))


@pytest.mark.parametrize("seed", [0, 1, 77, 2**31 - 1])
@pytest.mark.parametrize("probability", [2.0**-32, 0.05, 0.5, 0.9, 1 - 2.0**-40])
def test_the_kernels_mask_is_the_references(seed: int, probability: float) -> None:
    x = torch.ones(8, 1537)
    for base in (None, torch.tensor([987654321], dtype=torch.int32)):
        dropout = CounterDropout(seed, probability, base)
        out = drop_copy(x, dropout, out=torch.empty_like(x), backend="triton")
        assert out.equal(keep_mask_reference(x.shape, dropout, device="cpu").float())


def test_the_hash_of_large_places_is_that_of_whole_numbers() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def keep_kernel(place_ptr, out_ptr, base_ptr, has_base, seed, threshold, KEEP: tl.constexpr):
        index = tl.arange(0, 1024)
        kept = KEEP(tl.load(place_ptr + index).to(tl.uint32), base_ptr, has_base, seed, threshold)
        tl.store(out_ptr + index, kept.to(tl.int32))

    places = torch.randint(2**33, (1024,))
    places[:4] = torch.tensor([2**31 - 1, 2**31, MASK_32, 2**32])
    dropout, out = CounterDropout(2**31 - 1, 0.6), torch.empty(1024, dtype=torch.int32)
    keep_kernel[(1,)](places, out, *dropout_arguments(dropout, out), KEEP=keep_function())
    assert out.tolist() == [int(hash_of(place, dropout.seed) >= dropout.threshold) for place in places.tolist()]


def hash_of(place: int, seed: int) -> int:
    h = (place * 0x9E3779B1 + seed) & MASK_32
    h = (h ^ h >> 16) * 0x21F0AAAD & MASK_32
    h = (h ^ h >> 15) * 0x735A2D97 & MASK_32
    return h ^ h >> 15


@pytest.mark.parametrize(("width", "size"), [(4096, 2048), (11008, 1024), (1536, 512), (14336, 2048), (576, 1024)])
def test_tiles_of_columns_leave_few_threads_idle(width: int, size: int) -> None:
    assert columns_per_program(width) == size
