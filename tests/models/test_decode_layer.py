"""One new token through fused layers against the library's own layers, over the same cache."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from halfbyte.models import decode_layer as decode
from halfbyte.models.fused_layers import fuse_layers_
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.nn import adapters_disabled, expanded_for_inference
from tests.models.test_fused_layers import FAMILIES, make_model

PROMPTS = [[5, 9, 33, 21, 8], [7, 7, 40]]


def logits_of_steps(model: PreTrainedModel, *, mask: bool) -> torch.Tensor:
    """Return the logits of a prompt's last token and of three tokens after it, two prompts at once."""
    ids = torch.tensor([[5, 9, 33, 21], [7, 7, 40, 11]])
    attention_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]) if mask else torch.ones_like(ids)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for number in range(4):
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs = {"attention_mask": attention_mask, "position_ids": positions} if mask else {}
            steps.append(model(ids, past_key_values=cache, use_cache=True, **inputs).logits[:, -1])
            ids = torch.tensor([[12 + number], [30 - number]])
            attention_mask = torch.cat([attention_mask, torch.ones_like(ids)], dim=1)
    return torch.stack(steps)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("expanded", [False, True], ids=["packed", "expanded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_layer_agrees_with_the_library(
    family: str, expanded: bool, mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family, sliding_window=None).eval()
    keeping = expanded_for_inference(model) if expanded else contextlib.nullcontext()
    with keeping:
        expected = logits_of_steps(model, mask=mask)
        with adapters_disabled(model):
            expected_base = logits_of_steps(model, mask=mask)
        fuse_layers_(model)
        calls = []
        multiply = decode.multiply
        monkeypatch.setattr(decode, "multiply", lambda *args: calls.append(1) or multiply(*args))
        torch.testing.assert_close(logits_of_steps(model, mask=mask), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 3 * 2 * 7
        with adapters_disabled(model):
            torch.testing.assert_close(logits_of_steps(model, mask=mask), expected_base, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decode_layer_keeps_the_token_in_the_products_dtype_between_layers(family: str) -> None:
    model = make_model(family, dtype=torch.bfloat16).eval()
    exact = make_model(family).eval()
    exact.load_state_dict(model.state_dict())
    expected = logits_of_steps(exact, mask=False)
    with torch.no_grad(), expanded_for_inference(model, dtype=torch.float32):
        plain = logits_of_steps(model, mask=False).float()
        fuse_layers_(model)
        fused = logits_of_steps(model, mask=False)
    assert fused.dtype == torch.bfloat16
    assert (fused.float() - expected).norm() < 1.2 * (plain - expected).norm()


def test_generation_fuses_layers_for_as_long_as_it_runs() -> None:
    model = make_model("llama")
    kinds = [type(layer) for layer in model.model.layers]
    options = GenerationOptions(max_new_tokens=5)
    with inference_state(model):
        assert [type(layer) for layer in model.model.layers] != kinds
        tokens = list(iter_tokens(model, PROMPTS, options=options, stop_ids=frozenset()))
    assert [type(layer) for layer in model.model.layers] == kinds
    assert len(tokens) == 5
