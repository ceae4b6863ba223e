"""Quantising a model in memory."""

from __future__ import annotations

import torch
from torch import nn

from halfbyte.nn import Linear4bit, quantize_linears_
from halfbyte.nn.convert import replace_module, workspace_of
from halfbyte.quant import QuantSpec
from tests.nn.models import make_tokens, tiny_llama


def test_quantize_linears_leaves_the_head_and_what_it_is_told() -> None:
    model = tiny_llama()
    paths = quantize_linears_(model, QuantSpec(), skip={"model.layers.0.mlp.up_proj"})
    quantized = [path for path, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert paths == quantized
    assert len(paths) == 13
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert {id(module.workspace) for module in model.modules() if isinstance(module, Linear4bit)} == {
        id(workspace_of(model))
    }


def test_quantize_linears_stays_near_the_original() -> None:
    model, tokens = tiny_llama(), make_tokens()
    expected = model(tokens).logits
    quantize_linears_(model, QuantSpec())
    error = (model(tokens).logits - expected).norm() / expected.norm()
    assert 0 < error < 0.2


def test_replace_module_reaches_into_lists() -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity()), nn.Identity())
    new = nn.ReLU()
    replace_module(model, "0.0", new)
    assert model[0][0] is new
    other = nn.Tanh()
    replace_module(model, "1", other)
    assert model[1] is other
    assert torch.equal(model(torch.tensor([-1.0])), torch.tanh(torch.zeros(1)))
