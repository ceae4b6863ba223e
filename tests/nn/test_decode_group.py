"""A group's products while decoding against its layers' own forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.nn.decode_group import DecodeGroup, Projection, multiply_group
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.ops.decode_inner import plain_inner
from halfbyte.quant import QuantSpec

# Of each projection: whether it is in 4 bits, has a bias, has an adapter; its width.
Kind = tuple[bool, bool, bool, int]
GROUPS: list[list[Kind]] = [
    [(True, False, True, 40)],
    [(False, True, True, 24)],
    [(True, True, True, 32), (True, False, False, 8), (True, True, True, 8)],
    [(True, False, True, 32), (False, False, True, 8), (True, True, True, 8)],
    [(True, False, False, 48), (True, False, False, 48)],
]


def make_group(kinds: list[Kind]) -> list[Projection]:
    torch.manual_seed(1)
    projections: list[Projection] = []
    for number, (is_quantized, has_bias, has_adapter, width) in enumerate(kinds):
        linear = nn.Linear(64, width, bias=has_bias)
        base = Linear4bit.from_linear(linear, QuantSpec()) if is_quantized else linear
        projections.append(LoraLinear(base, rank=4 - number, alpha=8).eval() if has_adapter else base)
        if has_adapter:
            nn.init.normal_(projections[-1].lora_B)
    return projections


@pytest.mark.parametrize("kinds", GROUPS)
@torch.no_grad()
def test_multiply_group_equals_the_layers(kinds: list[Kind]) -> None:
    projections = make_group(kinds)
    group = DecodeGroup(projections, torch.float32)
    x_TD = torch.randn(3, 64)
    u_TR = plain_inner(x_TD, group.A_RD, group.scale_R)
    products = multiply_group(group, x_TD, u_TR)
    for projection, product in zip(projections, products, strict=True):
        torch.testing.assert_close(product, projection(x_TD), rtol=1e-5, atol=1e-4)
    if len(kinds) == 1:
        residual = torch.randn(3, kinds[0][3])
        (product,) = multiply_group(group, x_TD, u_TR, residual=residual)
        torch.testing.assert_close(product, projections[0](x_TD) + residual, rtol=1e-5, atol=1e-4)


def test_a_group_of_one_format_is_one_launch() -> None:
    assert [len(DecodeGroup(make_group(kinds), torch.float32).parts) for kinds in GROUPS] == [1, 1, 1, 3, 1]
