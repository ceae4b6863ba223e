"""matvec_4bit against fp64 on the same 4-bit weights; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from halfbyte.errors import BackendError
from halfbyte.kernels.matvec_4bit import MatvecLaunch
from halfbyte.ops import Workspace, quantize_4bit
from halfbyte.ops.linear_4bit import linear_4bit
from halfbyte.ops.lora_linear import LoraOptions, lora_linear
from halfbyte.ops.matvec_4bit import (
    MAX_TOKENS,
    default_launch,
    fits,
    matvec_4bit,
    matvec_4bit_reference,
    matvec_4bit_triton,
    share_launch,
)
from halfbyte.quant import QuantSpec
from tests.ops.matvec_cases import MatvecCase, check_matvec_group, lookup_roundings, make_matvec_case
from tests.oracles import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SPECS = [
    QuantSpec(codebook=codebook, block_size=block_size, double_quant=double_quant)
    for codebook, block_size, double_quant in itertools.product(("nf4", "fp4"), (32, 64, 128, 4096), (False, True))
]
SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.codebook}-{s.block_size}-{s.double_quant:d}")
TOKENS = pytest.mark.parametrize("tokens", [1, 2, 5, 8])
SHAPES = [(1, 64), (7, 128), (576, 576), (192, 576), (1536, 576), (130, 4096), (4096, 4096), (11008, 4096)]
LAUNCHES = [
    *(
        MatvecLaunch(lookup=lookup, rows_per_program=rows, num_warps=num_warps, prefetch=prefetch, overlap=overlap)
        for lookup in ("codes", "shuffle")
        for rows, num_warps, prefetch, overlap in ((1, 1, False, False), (4, 2, True, True), (8, 1, False, True))
    ),
    MatvecLaunch(rows_per_program=8, num_warps=1, overlap=True, ask_first=True),
    *(
        MatvecLaunch(lookup="tensor", rows_per_program=rows, num_warps=num_warps, prefetch=prefetch, overlap=overlap)
        for rows, num_warps, prefetch, overlap in (
            *((16, 1, False, False), (16, 4, True, True), (32, 2, True, False), (32, 4, False, True)),
        )
    ),
]
GROUPS = [((9,), (4,)), ((70, 33), (8, 3)), ((40, 32, 17), (8, 0, 3)), ((64, 5, 70), (0, 0, 0)), ((33, 7), (64, 64))]


def check(case: MatvecCase, y: torch.Tensor, *, lookup: str = "tensor") -> None:
    dtype = case.x.dtype
    assert y.dtype == dtype
    is_exact = lookup in ("codes", "shuffle") or dtype == torch.float32
    roundings = lookup_roundings(dtype, is_exact=is_exact)
    assert_close("y", case.exact(), y, dtype=dtype, roundings=roundings, reduction_length=case.q.shape[1])


@pytest.mark.parametrize("with_terms", [False, True], ids=["plain", "terms"])
@DTYPE
@pytest.mark.parametrize(("tokens", "shape"), [(1, (1, 64)), (2, (7, 128)), (5, (192, 576)), (8, (9, 4096))])
def test_matvec_4bit_on_a_cpu_matches_fp64(
    tokens: int, shape: tuple[int, int], dtype: torch.dtype, with_terms: bool
) -> None:
    case = make_matvec_case(tokens, shape, QuantSpec(), dtype, with_terms=with_terms)
    y = matvec_4bit(case.x, case.q, case.bias, add=case.add)
    check(case, y)
    assert y.equal(matvec_4bit_reference(case.x, case.q, case.bias, add=case.add))


def test_matvec_4bit_rounds_what_is_added_only_with_the_sum() -> None:
    # Beside 256 either addend alone is lost in bf16, and both together are not.
    q = quantize_4bit(torch.ones(1, 64), QuantSpec(double_quant=False))
    x = torch.full((1, 64), 4.0, dtype=torch.bfloat16)
    bias, add = torch.tensor([0.75]), torch.tensor([[0.5]])
    assert matvec_4bit(x, q, bias).item() == matvec_4bit(x, q, add=add).item() == 256
    assert matvec_4bit(x, q, bias, add=add).item() == 258


def test_matvec_4bit_makes_no_graph() -> None:
    q = quantize_4bit(torch.randn(8, 64), QuantSpec())
    assert not matvec_4bit(torch.randn(1, 64, requires_grad=True), q, torch.randn(8, requires_grad=True)).requires_grad


def test_fits_says_what_the_kernel_takes() -> None:
    q = quantize_4bit(torch.randn(8, 192), QuantSpec())
    x = torch.randn(MAX_TOKENS, 192)
    assert all(fits(x[:tokens].to(dtype), q) for tokens in (1, MAX_TOKENS) for dtype in DTYPES)
    assert not fits(torch.randn(MAX_TOKENS + 1, 192), q)
    assert not fits(x[:0], q)
    assert not fits(x[0], q)
    assert not fits(x.double(), q)
    assert not fits(torch.randn(1, 128), q)
    assert not fits(x.to("meta"), q)
    assert not fits(x, quantize_4bit(torch.randn(8, 192), QuantSpec(block_size=128)))
    shifted = torch.empty(q.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(q.packed)
    assert not fits(x, dataclasses.replace(q, packed=shifted))


def test_matvec_4bit_says_why_the_kernel_does_not_fit() -> None:
    q = quantize_4bit(torch.randn(8, 100), QuantSpec())
    with pytest.raises(BackendError, match="whole blocks in a row"):
        matvec_4bit_triton(torch.randn(1, 100), q, launch=MatvecLaunch())
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        matvec_4bit(torch.randn(1, 100), q, backend="triton")


@DTYPE
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("widths", "ranks"), GROUPS)
def test_matvec_4bit_group_on_a_cpu_matches_fp64(
    widths: tuple[int, ...], ranks: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> None:
    check_matvec_group(tokens, widths, ranks, 192, dtype)


@pytest.mark.gpu
@DTYPE
@TOKENS
@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
def test_matvec_4bit_group_on_a_gpu_matches_fp64(overlap: bool, tokens: int, dtype: torch.dtype) -> None:
    roundings = lookup_roundings(dtype, is_exact=dtype == torch.float32)
    large = [((4096, 1024, 1024), (16, 16, 16)), ((9000, 9000), (8, 0)), ((4096,), (256,))]
    for in_features, groups in ((192, GROUPS), (4096, large)):
        for widths, ranks in groups:
            check_matvec_group(
                tokens, widths, ranks, in_features, dtype, device="cuda", overlap=overlap, roundings=roundings
            )


def test_share_launch_is_for_weights_of_one_format_and_width() -> None:
    q, other = quantize_4bit(torch.randn(8, 64), QuantSpec()), quantize_4bit(torch.randn(3, 64), QuantSpec())
    assert share_launch([q, other, q])
    assert not share_launch([q, q, q, q])
    assert not share_launch([q, quantize_4bit(torch.randn(8, 128), QuantSpec())])
    assert not share_launch([q, quantize_4bit(torch.randn(8, 64), QuantSpec(codebook="fp4"))])
    assert not share_launch([q, quantize_4bit(torch.randn(8, 64), QuantSpec(double_quant=False))])


def test_default_launch_takes_tensor_cores_for_several_tokens_of_16_bits() -> None:
    assert default_launch(1, 4096, torch.bfloat16).lookup == "shuffle"
    assert default_launch(2, 4096, torch.float32).lookup == "shuffle"
    assert default_launch(2, 4096, torch.float16).lookup == "tensor"
    assert default_launch(1, 11008, torch.bfloat16) != default_launch(1, 4096, torch.bfloat16)


@pytest.mark.gpu
@SPEC
@DTYPE
@TOKENS
def test_matvec_4bit_on_a_gpu_matches_fp64_in_every_format(tokens: int, dtype: torch.dtype, spec: QuantSpec) -> None:
    case = make_matvec_case(tokens, (70, 8192), spec, dtype, device="cuda")
    check(case, matvec_4bit(case.x, case.q, case.bias, add=case.add))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPE
@TOKENS
def test_matvec_4bit_on_a_gpu_matches_fp64_in_every_shape(
    tokens: int, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    for spec in (QuantSpec(), QuantSpec(codebook="fp4", block_size=32, double_quant=False)):
        for with_terms in (False, True):
            case = make_matvec_case(tokens, shape, spec, dtype, with_terms=with_terms, device="cuda")
            y = matvec_4bit(case.x, case.q, case.bias, add=case.add)
            check(case, y)
            assert y.equal(matvec_4bit(case.x, case.q, case.bias, add=case.add))


@pytest.mark.gpu
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@DTYPE
@pytest.mark.parametrize("shape", [(1, 64), (7, 128), (193, 576), (66, 11008)], ids=str)
def test_matvec_4bit_on_a_gpu_matches_fp64_however_launched(
    shape: tuple[int, int], dtype: torch.dtype, launch: MatvecLaunch
) -> None:
    if launch.lookup == "tensor" and dtype == torch.float32:
        pytest.skip("tensor cores take 16 bits")
    for tokens, spec in (
        (1, QuantSpec()),
        (3, QuantSpec(codebook="fp4", double_quant=False)),
        (7, QuantSpec(block_size=32)),
        (8, QuantSpec()),
    ):
        case = make_matvec_case(tokens, shape, spec, dtype, device="cuda")
        y = matvec_4bit_triton(case.x, case.q, case.bias, add=case.add, launch=launch)
        check(case, y, lookup=launch.lookup)


@pytest.mark.gpu
def test_matvec_4bit_on_a_gpu_takes_any_strides() -> None:
    case = make_matvec_case(4, (70, 576), QuantSpec(), torch.bfloat16, device="cuda")
    expected = matvec_4bit(case.x, case.q, case.bias, add=case.add)
    wide = torch.empty(4, 577, dtype=torch.bfloat16, device="cuda")
    wide[:, 1:] = case.x
    assert matvec_4bit(wide[:, 1:], case.q, case.bias, add=case.add).equal(expected)
    assert matvec_4bit(wide[:1, 1:], case.q, case.bias, add=case.add[:1]).equal(expected[:1])
    turned = case.add.T.contiguous().T
    assert matvec_4bit(case.x.T.contiguous().T, case.q, case.bias, add=turned).equal(expected)


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_layers_on_a_gpu_multiply_few_tokens_without_expanding(tokens: int, dtype: torch.dtype) -> None:
    case = make_matvec_case(tokens, (192, 576), QuantSpec(), dtype, device="cuda")
    case = dataclasses.replace(case, add=None)
    lora_A, lora_B = torch.randn(8, 576, device="cuda") / 24, torch.randn(192, 8, device="cuda")
    plain, adapted = Workspace(), Workspace()
    y = linear_4bit(case.x, case.q, case.bias, workspace=plain)
    options = LoraOptions(scaling=2.0)
    z = lora_linear(case.x, case.q, case.bias, lora_A, lora_B, options=options, workspace=adapted)
    assert (plain.nbytes == 0) == (adapted.nbytes == 0) == (tokens <= MAX_TOKENS)
    # Rounded: the weight where it is expanded, A, the adapter's inner product, B, the result.
    part = 2.0 * (case.x.double() @ lora_A.double().T) @ lora_B.double().T
    assert_close("y", case.exact(), y, dtype=dtype, roundings=2, reduction_length=576)
    assert_close("z", case.exact() + part, z, dtype=dtype, roundings=5, reduction_length=576)
    x = case.x.clone().requires_grad_()
    assert linear_4bit(x, case.q, case.bias, workspace=plain).requires_grad
    assert plain.nbytes > 0
