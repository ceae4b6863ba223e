"""Fused layers where something around them is unusual: few adapters, attention shown, models moved, odd angles."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from halfbyte.models.fused_layers import (
    fuse_layers_,
    gradient_sums_of,
    has_fixed_angles,
    iter_decoder_layers,
    iter_fused_layers,
)
from halfbyte.nn import LoraSpec, attach_adapters, quantize_linears_
from halfbyte.quant import QuantSpec
from tests.models.tiny import SIZES

IDS = torch.arange(3, 15)[None]


def make_plain(layers: int = 3, **changes: Any) -> PreTrainedModel:
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": layers}), **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    quantize_linears_(model, QuantSpec())
    return model.requires_grad_(False)


def test_blocks_without_adapters_add_no_gradients() -> None:
    model = make_plain()
    attach_adapters(model, LoraSpec(rank=4, layers_to_transform=(0,)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    expected = [p.grad for p in parameters]
    fuse_layers_(model)
    sums = gradient_sums_of(model)
    sums.targets = {p: torch.zeros_like(p) for p in parameters}
    torch.autograd.grad(model(input_ids=IDS, labels=IDS, use_cache=False).loss, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(sums.targets[parameter], grad)


def test_attention_is_shown_where_it_is_asked_for() -> None:
    model = make_plain(attn_implementation="eager")
    with torch.no_grad():
        expected = model(IDS, use_cache=False, output_attentions=True).attentions
        fuse_layers_(model)
        shown = model(IDS, use_cache=False, output_attentions=True).attentions
        model.config.output_attentions = True
        by_config = model(IDS, use_cache=False).attentions
    torch.testing.assert_close(shown, expected)
    torch.testing.assert_close(by_config, expected)


def test_norms_follow_the_model() -> None:
    model = make_plain()
    fuse_layers_(model)
    with torch.no_grad():
        model(IDS, use_cache=False)
        model.to(torch.bfloat16)
        model(IDS, use_cache=False)
    for fused, layer in zip(iter_fused_layers(model), iter_decoder_layers(model), strict=True):
        parts: Any = fused.halfbyte_binding.parts
        assert parts.norm1.weight_D.data_ptr() == layer.input_layernorm.weight.data_ptr()


def test_angles_that_depend_on_the_length_are_known() -> None:
    assert has_fixed_angles(make_plain())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not has_fixed_angles(make_plain(rope_parameters=rope))
