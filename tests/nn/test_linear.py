"""Linear4bit: its tensors travel but never change, and its state dict is bitsandbytes'."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from halfbyte.nn import Linear4bit
from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.linear_4bit import linear_4bit_reference
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant import QuantSpec
from tests.oracles import assert_close

SPECS = [QuantSpec(), QuantSpec(double_quant=False), QuantSpec(codebook="fp4", block_size=128)]


def make_layer(spec: QuantSpec = SPECS[0], *, bias: bool = True) -> Linear4bit:
    return Linear4bit.from_linear(nn.Linear(96, 80, bias=bias, dtype=torch.bfloat16), spec)


def tensors_of(layer: Linear4bit) -> list[torch.Tensor]:
    return [t.clone() for t in layer.quantized.tensors()]


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(a.dtype == b.dtype and a.equal(b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear4bit_follows_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer = make_layer()
    x = torch.randn(3, 5, 96, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = linear_4bit_reference(x.double(), layer.quantized, layer.bias)
    assert_close("y", expected, y, dtype=dtype, roundings=2, reduction_length=96)


def test_linear4bit_describes_itself() -> None:
    layer = make_layer()
    assert (layer.in_features, layer.out_features) == (96, 80)
    assert "in_features=96, out_features=80, bias=True, nf4, block_size=64, double_quant" in repr(layer)
    assert layer.weight.shape == (80, 96)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.equal(dequantize_4bit_reference(layer.quantized))
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("convert", ["half", "float", "double", "bfloat16", "to", "to_both"])
def test_linear4bit_survives_casts(spec: QuantSpec, convert: str) -> None:
    layer = make_layer(spec)
    before = tensors_of(layer)
    if convert == "to":
        layer.to(torch.float16)
    elif convert == "to_both":
        layer.to("cpu", torch.float16)
    else:
        getattr(layer, convert)()
    assert all_equal(tensors_of(layer), before)
    assert layer.bias is not None
    assert layer.bias.dtype != torch.bfloat16 or convert == "bfloat16"


def test_linear4bit_moves_between_devices() -> None:
    layer = make_layer()
    layer.to("meta")
    assert {t.device.type for t in layer.quantized.tensors()} == {"meta"}


def test_linear4bit_can_be_copied() -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    before = tensors_of(layer)
    assert all_equal(tensors_of(twin), before)
    twin.packed.zero_()
    assert all_equal(tensors_of(layer), before)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear4bit_state_dict_is_that_of_bitsandbytes(spec: QuantSpec) -> None:
    linear = nn.Linear(96, 80, dtype=torch.bfloat16)
    layer = Linear4bit.from_linear(linear, spec)
    theirs = bnb.nn.Linear4bit(
        96, 80, compute_dtype=torch.bfloat16, quant_type=spec.codebook, compress_statistics=spec.double_quant
    )
    theirs.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        quant_type=spec.codebook,
        compress_statistics=spec.double_quant,
        blocksize=spec.block_size,
    )
    theirs.bias = nn.Parameter(linear.bias.data.clone())
    theirs.to("cpu")
    expected, actual = theirs.state_dict(), layer.state_dict()
    assert set(actual) == set(expected)
    assert {k: (v.dtype, v.shape) for k, v in actual.items()} == {k: (v.dtype, v.shape) for k, v in expected.items()}
    if spec.codebook == "nf4":
        # CPU thresholds of bitsandbytes' FP4 differ from those of its GPU kernels, which are ours.
        assert actual["weight"].equal(expected["weight"])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear4bit_state_dict_round_trips(spec: QuantSpec) -> None:
    model = nn.Sequential(make_layer(spec), make_layer(spec, bias=False))
    other = nn.Sequential(make_layer(), make_layer(bias=False))
    layer, twin = model[0], other[0]
    other.load_state_dict({f"0.{k}": v for k, v in layer.state_dict().items()} | model[1].state_dict(prefix="1."))
    assert all_equal(tensors_of(twin), tensors_of(layer))
    assert twin.quantized.spec == spec
    x = torch.randn(2, 96)
    assert twin(x).equal(layer(x))


def test_linear4bit_state_dict_is_read_strictly() -> None:
    layer = make_layer()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        layer.load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "scale"'):
        layer.load_state_dict({**state, "scale": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"not \(80, 96\)"):
        layer.load_state_dict(Linear4bit.from_linear(nn.Linear(64, 80), QuantSpec()).state_dict())


def test_linear4bit_shares_the_tensors_it_was_given() -> None:
    q = quantize_4bit(torch.randn(80, 96), QuantSpec())
    layer = Linear4bit.from_quantized(q, None, Workspace())
    assert [t.data_ptr() for t in layer.quantized.tensors()] == [t.data_ptr() for t in q.tensors()]
