"""Decoding on a CPU with everything folded into four matrices a layer, against the library's forward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.models import generate
from halfbyte.models.expanded_decoder import ExpandedDecoder
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.nn import adapters_disabled
from tests.models.test_fused_layers import FAMILIES
from tests.models.test_static_decoder import PROMPTS, logits_without_cache, make_fused


def check_logits(model: PreTrainedModel, prompts: list[list[int]], *, tolerance: float = 1e-4) -> None:
    """Compare the logits of the prompts and of a few tokens more with the library's of the whole text."""
    decoder = ExpandedDecoder(model, num_prompts=len(prompts), num_tokens=64)
    texts = [list(p) for p in prompts]
    # Twice: what is left of the first prompts must not show.
    for _ in range(2):
        texts = [list(p) for p in prompts]
        logits_BV = decoder.read(texts)
        for number in range(6):
            expected = torch.stack([logits_without_cache(model, text) for text in texts])
            torch.testing.assert_close(logits_BV, expected, rtol=tolerance, atol=tolerance)
            for row, text in enumerate(texts):
                text.append((17 * number + 5 * row) % 90 + 3)
            logits_BV = decoder.advance(torch.tensor([text[-1] for text in texts]))


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_decoder_gives_the_librarys_logits(family: str, prompts: list[list[int]]) -> None:
    model = make_fused(family)
    check_logits(model, prompts)
    with adapters_disabled(model):
        check_logits(model, prompts[:1])


def test_expanded_decoder_serves_until_its_weights_change() -> None:
    model = make_fused("llama")
    decoder = ExpandedDecoder(model, num_prompts=1, num_tokens=64)
    assert decoder.serves(model, num_prompts=1, num_tokens=64)
    assert not decoder.serves(model, num_prompts=2, num_tokens=64)
    assert not decoder.serves(model, num_prompts=1, num_tokens=1000)
    with adapters_disabled(model):
        assert not decoder.serves(model, num_prompts=1, num_tokens=64)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(2)
    assert not decoder.serves(model, num_prompts=1, num_tokens=64)


def test_expanded_decoder_counts_its_bytes() -> None:
    model = make_fused("llama")
    decoder = ExpandedDecoder(model, num_prompts=1, num_tokens=64)
    held = sum(
        product.weight_DF.nbytes
        for layer in decoder.layers
        for product in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )
    assert held == sum(4 * p.in_features * p.out_features for n, p in model.named_modules() if n.endswith("_proj"))


def test_iter_tokens_expands_a_model_once_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(ExpandedDecoder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(generate, "ExpandedDecoder", Counted)
    model = make_fused("llama")
    run = functools.partial(iter_tokens, model, PROMPTS, options=GenerationOptions(max_new_tokens=4))
    with inference_state(model):
        first = list(run(stop_ids=frozenset()))
        assert list(run(stop_ids=frozenset())) == first
        assert len(made) == 1
        with adapters_disabled(model):
            list(run(stop_ids=frozenset()))
        assert len(made) == 2
    assert not any(getattr(module, "expanded", None) for module in model.modules())
