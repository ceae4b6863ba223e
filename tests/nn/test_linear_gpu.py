"""Linear4bit on a GPU, without the packages that a GPU machine may lack."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.nn import Linear4bit, LoraLinear
from halfbyte.quant import QuantSpec
from tests.oracles import assert_close


@pytest.mark.gpu
def test_linear4bit_moves_to_a_gpu_and_back() -> None:
    layer = Linear4bit.from_linear(nn.Linear(96, 80, dtype=torch.bfloat16), QuantSpec())
    before, x = [t.clone() for t in layer.quantized.tensors()], torch.randn(3, 96, dtype=torch.bfloat16)
    expected = layer(x)
    layer.cuda().half()
    assert all(t.is_cuda for t in layer.quantized.tensors())
    y = layer(x.cuda())
    assert_close("y", expected, y, dtype=torch.bfloat16, roundings=4, reduction_length=96)
    layer.cpu()
    assert all(a.equal(b) for a, b in zip(layer.quantized.tensors(), before, strict=True))


@pytest.mark.gpu
def test_lora_linear_trains_on_a_gpu_as_on_a_cpu() -> None:
    layer = LoraLinear.from_base(Linear4bit.from_linear(nn.Linear(96, 80), QuantSpec()), rank=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 96)
    layer(x).square().sum().backward()
    expected = [layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]
    layer.zero_grad(set_to_none=True)
    layer.cuda()
    layer(x.cuda()).square().sum().backward()
    for name, before, after in zip("AB", expected, (layer.lora_A.grad, layer.lora_B.grad), strict=True):
        assert_close(name, before, after, dtype=torch.float32, roundings=16, reduction_length=96)
