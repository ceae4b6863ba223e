"""Weights kept expanded while generating: the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from halfbyte.nn import Linear4bit, LoraLinear, LoraSpec, adapters_disabled, expanded_for_inference, iter_trainable
from tests.nn.models import WORDS, make_tokens, tiny_quantized_llama
from tests.nn.test_attach import adapted_llama, gradients
from tests.oracles import assert_close


def expandable(model: torch.nn.Module) -> list[Linear4bit | LoraLinear]:
    return [module for module in model.modules() if isinstance(module, (Linear4bit, LoraLinear))]


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_expanded_for_inference_gives_the_same_logits(adapted: bool) -> None:
    model = (adapted_llama() if adapted else tiny_quantized_llama()).eval()
    tokens = make_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        with expanded_for_inference(model):
            assert sum(module.is_expanded for module in expandable(model)) == 14
            logits = model(tokens).logits
            one = model(tokens[:, :1]).logits
        assert_close("logits", expected, logits, dtype=torch.float32, roundings=32, reduction_length=WORDS)
        assert_close("one", expected[:, :1], one, dtype=torch.float32, roundings=32, reduction_length=WORDS)
        assert model(tokens).logits.equal(expected)
    assert not any(module.is_expanded for module in expandable(model))


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


def test_expanded_for_inference_expands_to_the_dtype_of_the_model() -> None:
    model = adapted_llama().eval().bfloat16()
    with torch.no_grad(), expanded_for_inference(model):
        layer = model.model.layers[0].mlp.up_proj
        assert layer._expanded.weights_ED.dtype == torch.bfloat16
        assert layer._expanded.weights_ED.shape == (96 + 4, 64)
        assert model(make_tokens()).logits.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for _, parameter in iter_trainable(model))


def test_expanded_for_inference_can_be_nested_and_broken_out_of() -> None:
    model = adapted_llama()
    with expanded_for_inference(model):
        with expanded_for_inference(model):
            pass
        assert any(module.is_expanded for module in expandable(model))
    with pytest.raises(KeyError), expanded_for_inference(model):
        raise KeyError
    assert not any(module.is_expanded for module in expandable(model))
