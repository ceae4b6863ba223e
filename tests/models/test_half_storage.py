from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.models.half_storage import BLOCK_ELEMENTS, HalfEmbedding, HalfHead
from halfbyte.ops.workspace import Workspace
from tests.oracles import assert_close

# More rows than one block holds, and a last block that is short.
WIDTH = 512
ROWS = BLOCK_ELEMENTS // WIDTH + 77


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_embedding_widens_exactly(dtype: torch.dtype) -> None:
    embedding = nn.Embedding(50, 8).to(dtype)
    half = HalfEmbedding.from_embedding(embedding, torch.float32)
    ids = torch.randint(0, 50, (3, 5))
    assert half.weight is embedding.weight
    assert torch.equal(half(ids), embedding(ids).float())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, WIDTH), (2, 3, WIDTH)])
def test_half_head_equals_a_wide_copy(shape: tuple[int, ...], has_bias: bool) -> None:
    head = nn.Linear(WIDTH, ROWS, bias=has_bias).to(torch.bfloat16).requires_grad_(False)
    half = HalfHead.from_linear(head, workspace=Workspace())
    x, other_x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    bias = None if head.bias is None else head.bias.float()
    expected = nn.functional.linear(other_x, head.weight.float(), bias)
    y = half(x)
    assert_close("y", expected, y, dtype=torch.float32, reduction_length=WIDTH)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    (expected_grad_x,) = torch.autograd.grad(expected, other_x, grad_y)
    assert_close("grad_x", expected_grad_x, grad_x, dtype=torch.float32, reduction_length=ROWS)


def test_half_head_is_plain_in_its_own_dtype() -> None:
    head = nn.Linear(16, 24).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    assert torch.equal(HalfHead.from_linear(head, workspace=Workspace())(x), head(x))
