"""Weights kept expanded while generating: the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from halfbyte.nn import (
    Linear4bit,
    LoraLinear,
    LoraSpec,
    adapters_disabled,
    expanded_for_inference,
    expanded_nbytes,
    iter_trainable,
)
from halfbyte.nn.expanded import FEW_TOKENS
from tests.nn.models import WORDS, make_tokens, tiny_quantized_llama
from tests.nn.test_attach import adapted_llama, gradients
from tests.oracles import assert_close


def num_expanded(model: torch.nn.Module) -> int:
    layers = [module for module in model.modules() if isinstance(module, (Linear4bit, LoraLinear))]
    return sum(layer.expanded is not None for layer in layers)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_expanded_for_inference_gives_the_same_logits(adapted: bool) -> None:
    model = (adapted_llama() if adapted else tiny_quantized_llama()).eval()
    tokens = make_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        with expanded_for_inference(model):
            assert num_expanded(model) == 14
            logits = model(tokens).logits
            one = model(tokens[:, :1]).logits
        assert_close("logits", expected, logits, dtype=torch.float32, roundings=32, reduction_length=WORDS)
        assert_close("one", expected[:, :1], one, dtype=torch.float32, roundings=32, reduction_length=WORDS)
        assert model(tokens).logits.equal(expected)
    assert num_expanded(model) == 0


def test_expanded_for_inference_respects_disabled_adapters() -> None:
    model, tokens = adapted_llama().eval(), make_tokens()
    with torch.no_grad(), adapters_disabled(model):
        expected = model(tokens).logits
        with expanded_for_inference(model):
            logits = model(tokens).logits
    assert_close("logits", expected, logits, dtype=torch.float32, roundings=32, reduction_length=WORDS)


def test_expanded_for_inference_leaves_training_alone() -> None:
    model = adapted_llama(LoraSpec(rank=4, dropout=0.3, seed=1)).train()
    torch.manual_seed(0)
    expected = gradients(model)
    with expanded_for_inference(model):
        torch.manual_seed(0)
        inside = gradients(model)
    torch.manual_seed(0)
    after = gradients(model)
    assert all(inside[name].equal(grad) and after[name].equal(grad) for name, grad in expected.items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_expanded_for_inference_keeps_the_dtype_of_activations(dtype: torch.dtype | None) -> None:
    model, tokens = adapted_llama().eval().bfloat16(), make_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        with expanded_for_inference(model, dtype=dtype):
            layer = model.model.layers[0].mlp.up_proj
            assert layer.expanded.weight_FD.dtype == (dtype or torch.float32)
            assert layer.expanded.both_ED.shape == (96 + 4, 64)
            logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    # About forty roundings in a row on either side.
    assert_close("logits", expected, logits, dtype=torch.bfloat16, roundings=80)
    assert all(parameter.dtype == torch.float32 for _, parameter in iter_trainable(model))


def test_expanded_for_inference_multiplies_many_tokens_in_16_bits() -> None:
    layer = adapted_llama().eval().bfloat16().model.layers[0].mlp.up_proj
    many = torch.randn(FEW_TOKENS + 1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(many)
        layer.expanded = layer.expand(torch.float32)
        assert layer(many).equal(expected)
        assert not layer(many[:-1]).equal(expected[:-1])


def test_expanded_nbytes_is_what_it_takes() -> None:
    model = tiny_quantized_llama()
    elements = sum(m.quantized.numel for m in model.modules() if isinstance(m, Linear4bit))
    assert expanded_nbytes(model) == 4 * elements
    assert expanded_nbytes(adapted_llama(), dtype=torch.bfloat16) == 2 * elements


def test_expanded_for_inference_can_be_nested_and_broken_out_of() -> None:
    model = adapted_llama()
    with expanded_for_inference(model):
        with expanded_for_inference(model):
            pass
        assert num_expanded(model) == 14
    with pytest.raises(KeyError), expanded_for_inference(model):
        raise KeyError
    assert num_expanded(model) == 0
