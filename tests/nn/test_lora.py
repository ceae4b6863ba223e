"""LoraLinear beside both kinds of base, against PEFT."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from torch import nn

from halfbyte.nn import Linear4bit, LoraLinear
from halfbyte.quant import QuantSpec
from tests.oracles import assert_close


def make_base(kind: str) -> Linear4bit | nn.Linear:
    linear = nn.Linear(96, 80)
    return linear if kind == "plain" else Linear4bit.from_linear(linear, QuantSpec())


def make_layer(kind: str = "4bit", *, dropout: float = 0.0, rslora: bool = False) -> LoraLinear:
    layer = LoraLinear.from_base(make_base(kind), rank=4, alpha=12, dropout=dropout, rslora=rslora)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("kind", ["plain", "4bit"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_linear_equals_peft(kind: str, rslora: bool) -> None:
    layer = make_layer(kind, rslora=rslora)
    reference = nn.Sequential(nn.Linear(96, 80))
    reference[0].weight.data.copy_(layer.weight)
    reference[0].bias.data.copy_(layer.bias)
    theirs = peft.get_peft_model(
        reference, peft.LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=["0"], lora_dropout=0.0)
    )
    their_layer = theirs.base_model.model[0]
    their_A, their_B = their_layer.lora_A["default"].weight, their_layer.lora_B["default"].weight
    their_A.data.copy_(layer.lora_A)
    their_B.data.copy_(layer.lora_B)
    x = torch.randn(5, 96, requires_grad=True)
    their_x = x.detach().clone().requires_grad_()
    y, expected = layer(x), theirs(their_x)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, a, b in (
        ("y", expected, y),
        ("x", their_x.grad, x.grad),
        ("A", their_A.grad, layer.lora_A.grad),
        ("B", their_B.grad, layer.lora_B.grad),
    ):
        assert_close(name, b, a, dtype=torch.float32, roundings=8, reduction_length=96)
    assert layer.bias.grad is None
    assert layer.scaling == their_layer.scaling["default"]


def test_lora_linear_starts_as_its_base() -> None:
    base = make_base("4bit")
    layer = LoraLinear.from_base(base, rank=4, alpha=8)
    x = torch.randn(3, 96)
    assert layer(x).equal(base(x))
    bound = 1 / math.sqrt(96)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert layer.unwrap() is base


def test_lora_linear_drops_in_training_only() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.randn(3, 96)
    first, second = layer(x), layer(x)
    assert not first.equal(second)
    layer.eval()
    assert layer(x).equal(layer(x))
    undropped = make_layer().eval()
    undropped.load_state_dict(layer.state_dict())
    assert layer(x).equal(undropped(x))


def test_lora_linear_disabled_is_its_base() -> None:
    layer = make_layer()
    x = torch.randn(3, 96)
    layer.adapter_enabled = False
    assert layer(x).equal(layer.base(x))


def test_lora_linear_delta_is_what_the_adapter_adds() -> None:
    layer = make_layer()
    x = torch.randn(3, 96)
    delta = layer.delta()
    assert delta.dtype == torch.float32
    expected = layer.base(x).double() + x.double() @ delta.double().T
    assert_close("y", expected, layer(x), dtype=torch.float32, roundings=8, reduction_length=96)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("kind", ["plain", "4bit"])
def test_lora_linear_keeps_its_masters(kind: str, convert: str) -> None:
    layer = make_layer(kind)
    parameter = layer.lora_A
    before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    getattr(layer, convert)()
    assert layer.lora_A is parameter
    assert layer.lora_A.equal(before[0])
    assert layer.lora_B.equal(before[1])
    assert layer.bias.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[convert]


def test_lora_linear_seed_decides_alone() -> None:
    layer, other = make_layer(), make_layer()
    layer.reset_adapter(3)
    torch.manual_seed(8)
    other.reset_adapter(3)
    assert layer.lora_A.equal(other.lora_A)
    assert not layer.lora_B.any()
    other.reset_adapter(4)
    assert not layer.lora_A.equal(other.lora_A)


def test_lora_linear_can_be_copied() -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 96)
    assert twin(x).equal(layer(x))
    twin(x).sum().backward()
    assert twin.lora_A.grad is not None
    assert layer.lora_A.grad is None
    assert twin.workspace is twin.base.workspace


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_lora_linear_expanded_equals_not_expanded(enabled: bool, with_bias: bool) -> None:
    layer = make_layer().eval()
    if not with_bias:
        layer.base.bias = None
    layer.adapter_enabled = enabled
    for shape in ((1, 1, 96), (2, 5, 96), (96,)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = layer(x)
            layer.expanded = layer.expand(torch.float32)
            actual = layer(x)
            layer.expanded = None
        assert actual.is_contiguous()
        assert_close(str(shape), expected, actual, dtype=torch.float32, roundings=8, reduction_length=96)
