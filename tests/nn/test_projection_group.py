"""A group of projections against each of them by itself; the block around it is tested by tests/models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.projection_group import Projection, ProjectionGroup
from halfbyte.ops.block_dropout import BlockDropout
from halfbyte.ops.workspace import Workspace
from halfbyte.quant import QuantSpec
from tests.oracles import assert_close

WIDTH, TOKENS = 64, 24
RIDE = pytest.mark.parametrize("adapters_ride", [False, True], ids=["added", "riding"])
NO_DROPOUT = BlockDropout(0.0, None)


def make_layers(*, ranks: tuple[int, ...] = (4, 0, 8), alphas: tuple[float, ...] = (8, 0, 4)) -> list[Projection]:
    """Return projections of 48, 32 and 16 outputs; rank 0 is one without an adapter."""
    layers: list[Projection] = []
    for outputs, rank, alpha in zip((48, 32, 16), ranks, alphas, strict=True):
        base = Linear4bit.from_linear(nn.Linear(WIDTH, outputs), QuantSpec())
        if rank:
            layer = LoraLinear(base, rank=rank, alpha=alpha)
            nn.init.normal_(layer.lora_B, std=0.1)
            layers.append(layer)
        else:
            layers.append(base)
    return layers


def make_group(layers: list[Projection], *, adapters_ride: bool) -> ProjectionGroup:
    return ProjectionGroup(layers, kind="test", workspace=Workspace(), owners={}, adapters_ride=adapters_ride)


def forward(group: ProjectionGroup, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_TE = group.take_input("input", len(x), dtype=x.dtype, device=x.device)
    x_TE[:, :WIDTH] = x
    return group.forward(x_TE, NO_DROPOUT)


@RIDE
@pytest.mark.parametrize("alphas", [(8, 0, 4), (8, 0, 16)], ids=["two scalings", "one scaling"])
def test_group_equals_its_projections_forward_and_backward(adapters_ride: bool, alphas: tuple[float, ...]) -> None:
    layers = make_layers(alphas=alphas)
    group = make_group(layers, adapters_ride=adapters_ride)
    x, grad_y = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, group.out_features)
    expected = torch.cat([layer(x) for layer in layers], dim=1)
    expected_grads = torch.autograd.grad(expected, [x, *group.parameters], grad_y)
    with torch.no_grad():
        y, u = forward(group, x)
        grad_x, grad_u, adapter = group.backward_input(grad_y, NO_DROPOUT, in_parts=True)
        grad_x = grad_x.clone() if adapter is None else grad_x + adapter
        grads = [grad_x, *group.backward_adapters(grad_y, grad_u, x, u)]
    assert_close("y", expected, y, dtype=torch.float32, roundings=4, reduction_length=WIDTH)
    for number, (grad, expected_grad) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_close(f"grad {number}", expected_grad, grad, dtype=torch.float32, roundings=4, reduction_length=96)


@RIDE
def test_group_does_not_round_a_small_adapter_away(adapters_ride: bool) -> None:
    layers = make_layers(ranks=(16, 0, 16), alphas=(16, 0, 16))
    group = make_group(layers, adapters_ride=adapters_ride)
    x = torch.randn(2048, WIDTH).bfloat16()
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    with torch.no_grad():
        for layer in adapted:
            layer.lora_B.normal_(std=3e-4)
        y = forward(group, x)[0].double()
        exact = torch.cat([x.double() @ layer.delta().double().T for layer in adapted], dim=1)
        for layer in adapted:
            layer.lora_B.zero_()
        added = (y - forward(group, x)[0].double())[:, [*range(48), *range(80, 96)]]
    assert ((added * exact).sum() / exact.square().sum()).item() == pytest.approx(1, abs=0.1)


@RIDE
def test_group_sees_what_changes_between_calls(adapters_ride: bool) -> None:
    layers = make_layers()
    group = make_group(layers, adapters_ride=adapters_ride)
    x = torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        forward(group, x)
        layers[0].lora_B.data.mul_(-3)
        torch.testing.assert_close(forward(group, x)[0], torch.cat([layer(x) for layer in layers], dim=1))
        layers[2].adapter_enabled = False
        torch.testing.assert_close(forward(group, x)[0], torch.cat([layer(x) for layer in layers], dim=1))


def test_group_refuses_adapters_that_drop_differently() -> None:
    layers = make_layers()
    layers[0].dropout = 0.5
    with pytest.raises(AssertionError, match="drop differently"):
        make_group(layers, adapters_ride=False)
