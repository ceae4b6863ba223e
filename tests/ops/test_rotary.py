"""rotate_ against autograd in fp64 of transformers' formula; the kernel on a GPU, and interpreted in tests/kernels."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from halfbyte.ops.rotary import rotate_
from tests.ops.fused_cases import Place, check_rotate

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPE
@pytest.mark.parametrize("angle_dtype", [None, torch.float32], ids=str)
def test_rotate_and_its_gradient_match_autograd(angle_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    for shape in ((1, 1, 2), (7, 9, 64), (5, 3, 80)):
        check_rotate(shape, dtype, Place(), angle_dtype=angle_dtype)


def test_rotate_in_fp64_is_exact() -> None:
    check_rotate((7, 9, 64), torch.float64, Place())


def test_rotate_equals_transformers_own() -> None:
    q_BNTH = torch.randn(1, 4, 6, 16)
    angles = torch.rand(1, 6, 8).repeat(1, 1, 2)
    expected, _ = apply_rotary_pos_emb(q_BNTH, q_BNTH, angles.cos(), angles.sin())
    turned = rotate_(q_BNTH[0].transpose(0, 1).contiguous(), angles[0].cos(), angles[0].sin())
    torch.testing.assert_close(turned, expected[0].transpose(0, 1))


def test_turning_back_undoes_turning() -> None:
    x, angles = torch.randn(6, 4, 16), torch.rand(6, 8).repeat(1, 2)
    turned = rotate_(x.clone(), angles.cos(), angles.sin())
    torch.testing.assert_close(rotate_(turned, angles.cos(), angles.sin(), backward=True), x)


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 9, 64), (9, 32, 128), (33, 64, 128), (1000, 12, 64), (5, 3, 80)])
@pytest.mark.parametrize("spare", [0, 5, 8, 16, 4096])
def test_rotate_kernel_on_a_gpu_matches_autograd(spare: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for angle_dtype in (None, torch.float32):
        check_rotate(shape, dtype, Place("triton", "cuda", spare=spare), angle_dtype=angle_dtype)
