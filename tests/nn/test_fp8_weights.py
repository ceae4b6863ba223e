"""A group of projections in fp8 against the same group in 16 bits or fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.nn.fp8_weights import Fp8Weights
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.projection_group import Projection, ProjectionGroup
from halfbyte.ops.block_dropout import BlockDropout
from halfbyte.ops.e4m3 import encode, scale_of
from halfbyte.ops.workspace import Workspace
from halfbyte.quant import QuantSpec
from tests.oracles import assert_close, relative_rms

WIDTH, TOKENS = 256, 64
NO_DROPOUT = BlockDropout(0.0, None)
# A factor rounded to 4 significant bits errs by 2^-4 / sqrt(12), at the most twice that of its power of two, so by some
# 2.6%; two of them.
PRODUCT_ERROR = 0.045


def make_layers(device: str = "cpu", *, outputs: tuple[int, ...] = (144, 96, 48)) -> list[Projection]:
    """Return projections with adapters of different ranks, one without, and one that is not in 4 bits."""
    layers: list[Projection] = []
    for rank, count in zip((4, 0, 8), outputs, strict=True):
        linear = nn.Linear(WIDTH, count)
        linear.weight.data *= torch.exp2(torch.randint(-4, 5, (count, 1)).float())
        base = linear if rank == 8 else Linear4bit.from_linear(linear, QuantSpec())
        if rank:
            layer = LoraLinear(base, rank=rank, alpha=16)
            nn.init.normal_(layer.lora_B, std=0.02)
            layers.append(layer.to(device))
        else:
            layers.append(base.to(device))
    return layers


def make_group(layers: list[Projection], *, products: str, adapters_ride: bool) -> ProjectionGroup:
    return ProjectionGroup(
        layers, kind="test", workspace=Workspace(), owners={}, adapters_ride=adapters_ride, products=products
    )


def run(group: ProjectionGroup, x: torch.Tensor, grad_y: torch.Tensor) -> list[torch.Tensor]:
    """Return y, grad_x and the gradients of the adapters."""
    x_TE = group.take_input("input", len(x), dtype=x.dtype, device=x.device)
    x_TE[:, :WIDTH] = x
    with torch.no_grad():
        y, u = group.forward(x_TE, NO_DROPOUT)
        grad_x, grad_u, adapter = group.backward_input(grad_y, NO_DROPOUT, in_parts=True)
        grad_x = grad_x.clone() if adapter is None else grad_x + adapter
        return [y, grad_x, *group.backward_adapters(grad_y, grad_u, x, u)]


def check_group(device: str, dtype: torch.dtype, *, adapters_ride: bool) -> None:
    layers = make_layers(device)
    x = (torch.randn(TOKENS, WIDTH) * torch.exp2(torch.randint(-8, 8, (TOKENS, 1)).float())).to(device, dtype)
    grad_y = (torch.randn(TOKENS, 288) * torch.exp2(torch.randint(-20, -4, (TOKENS, 1)).float())).to(device, dtype)
    plain = run(make_group(layers, products="16bit", adapters_ride=adapters_ride), x, grad_y)
    fp8 = run(make_group(layers, products="fp8", adapters_ride=adapters_ride), x, grad_y)
    for name, expected, actual in zip(("y", "grad_x"), plain[:2], fp8[:2], strict=True):
        # Of each token for itself: their magnitudes lie far apart.
        error = (actual.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
        assert error.square().mean().sqrt() < PRODUCT_ERROR, f"{name}: {error}"
        assert error.mean() > 0.005, f"{name} is not rounded to fp8"
    for expected, actual in zip(plain[2:], fp8[2:], strict=True):
        assert_close("adapter", expected, actual, dtype=dtype, roundings=4, reduction_length=288)


@pytest.mark.parametrize("adapters_ride", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_in_fp8_errs_by_the_rounding_of_factors(adapters_ride: bool, dtype: torch.dtype) -> None:
    check_group("cpu", dtype, adapters_ride=adapters_ride)


@pytest.mark.gpu
def test_group_in_fp8_errs_by_the_rounding_of_factors_on_a_gpu() -> None:
    check_group("cuda", torch.bfloat16, adapters_ride=True)


def check_small_adapter(device: str) -> None:
    """Check how much of an adapter's part, far below the rounding of y to bf16, is in y on average."""
    layers = [layer for layer in make_layers(device) if isinstance(layer, LoraLinear)]
    group = make_group(layers, products="fp8", adapters_ride=True)
    x = torch.randn(8192, WIDTH, device=device).bfloat16()
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.normal_(std=3e-4)
        y = group.forward(x, NO_DROPOUT)[0].double()
        exact = torch.cat([x.double() @ layer.delta().double().T for layer in layers], dim=1)
        for layer in layers:
            layer.lora_B.zero_()
        base = group.forward(x, NO_DROPOUT)[0].double()
    assert relative_rms(base, y) < 2.0**-7
    assert (((y - base) * exact).sum() / exact.square().sum()).item() == pytest.approx(1, abs=0.1)


def test_group_in_fp8_does_not_round_a_small_adapter_away() -> None:
    check_small_adapter("cpu")


@pytest.mark.gpu
def test_group_in_fp8_does_not_round_a_small_adapter_away_on_a_gpu() -> None:
    check_small_adapter("cuda")


@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1, 10.0])
def test_adapter_in_fp8_has_the_precision_of_bf16(size: float) -> None:
    layer = Linear4bit.from_linear(nn.Linear(WIDTH, 64), QuantSpec())
    weights = Fp8Weights([layer], Workspace())
    x = torch.randn(TOKENS, WIDTH) + 20 * torch.eye(TOKENS, WIDTH)
    u, B = x @ torch.randn(WIDTH, 16) / 16, torch.randn(64, 16) * size
    base = weights.forward(x, torch.zeros_like(u), torch.zeros_like(B))
    # Large parts change the scales, and so how base values are rounded: its weights are taken away.
    weights.layers[0].absmax_scale.zero_()
    weights.layers[0].absmax_offset.zero_()
    added = weights.forward(x, u, B)
    assert relative_rms(u @ B.T, added) < 2.0**-7
    assert base.isfinite().all()


def test_row_scales_are_no_larger_than_needed() -> None:
    weights = Fp8Weights([Linear4bit.from_linear(nn.Linear(WIDTH, 64, bias=False), QuantSpec())], Workspace())
    x = torch.eye(WIDTH)[:16]
    y = weights.forward(x, None, None)
    exact = weights.layers[0](torch.eye(WIDTH)).T
    scale = scale_of(exact.abs().amax(1))
    assert y.T.equal((encode(exact / scale[:, None]).float() * scale[:, None])[:, :16])
    grad = weights.backward(torch.eye(64), out=torch.empty(64, WIDTH))
    assert grad.equal(encode(exact / scale[:, None]).float() * scale[:, None])


def test_group_in_fp8_refuses_widths_that_tensor_cores_do_not_take() -> None:
    with pytest.raises(AssertionError, match="multiples of 16"):
        Fp8Weights([nn.Linear(WIDTH, 40)], Workspace())
