"""The same layers, ranks and scalings as PEFT, and a clear error where PEFT is silent."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.errors import ConfigError
from halfbyte.nn import LoraSpec, attach_adapters, iter_lora
from halfbyte.nn.targets import find_saved, find_targets
from tests.nn.models import peft_adapters, tiny_gpt2, tiny_llama, tiny_quantized_llama

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all-linear": ({}, {"target_modules": "all-linear"}),
    "names": ({"targets": ("q_proj", "down_proj")}, {"target_modules": ["q_proj", "down_proj"]}),
    "longer names": ({"targets": ("mlp.up_proj",)}, {"target_modules": ["mlp.up_proj"]}),
    "whole path": (
        {"targets": ("model.layers.1.mlp.up_proj",)},
        {"target_modules": ["model.layers.1.mlp.up_proj"]},
    ),
    "the head by name": ({"targets": ("q_proj", "lm_head")}, {"target_modules": ["q_proj", "lm_head"]}),
    "regex": (
        {"targets": r".*layers\.1\..*(q|v)_proj"},
        {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    ),
    "excluded names": (
        {"targets": ("q_proj", "k_proj"), "exclude": ("layers.0.self_attn.q_proj",)},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "excluded from all-linear": (
        {"exclude": ("k_proj",)},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ),
    "excluded regex": (
        {"targets": ("q_proj", "k_proj"), "exclude": r".*layers\.0.*"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*"},
    ),
    "layers": (
        {"targets": ("q_proj",), "layers_to_transform": (1,)},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "layers of a pattern": (
        {"targets": ("q_proj",), "layers_to_transform": (0,), "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "patterns": (
        {
            "targets": ("q_proj", "v_proj", "up_proj"),
            "rank_pattern": {"q_proj": 4, r"layers\.1\..*": 6},
            "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 5, "up_proj": 7, "v_proj": 3},
        },
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 4, r"layers\.1\..*": 6},
            "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 5, "up_proj": 7, "v_proj": 3},
        },
    ),
    "rslora": ({"targets": ("q_proj",), "rslora": True}, {"target_modules": ["q_proj"], "use_rslora": True}),
    "modules to save": (
        {"modules_to_save": ("lm_head", "norm")},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm"]},
    ),
    "modules to save among the targets": (
        {"targets": ("q_proj", "k_proj"), "modules_to_save": ("k_proj",)},
        {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["k_proj"]},
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES)
def test_find_targets_means_what_peft_means(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    expected = peft_adapters(tiny_llama(), r=8, lora_alpha=24, **theirs)
    model = tiny_quantized_llama()
    attach_adapters(model, LoraSpec(rank=8, alpha=24, **ours))
    assert {path: (layer.rank, layer.scaling) for path, layer in iter_lora(model)} == expected


def test_find_targets_limits_all_linear_to_layers() -> None:
    paths = [target.path for target in find_targets(tiny_llama(), LoraSpec(layers_to_transform=(1,)))]
    assert len(paths) == 7
    assert all(path.startswith("model.layers.1.") for path in paths)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": (
        {"targets": ("query",)},
        r"lora\.targets \(query\) matches no layer.*q_proj x 2, k_proj x 2, .*lm_head x 1",
    ),
    "one unknown name of two": ({"targets": ("q_proj", "query")}, r"lora\.targets names 'query'.*q_proj x 2"),
    "regex": ({"targets": r"layers.*q_proj"}, r"lora\.targets \(layers\.\*q_proj\) matches no layer"),
    "everything excluded": ({"targets": ("q_proj",), "exclude": ("q_proj",)}, r"exclude \('q_proj',\)"),
    "unknown exclusion": ({"exclude": ("query",)}, r"lora\.exclude names 'query'"),
    "embedding": ({"targets": ("embed_tokens",)}, r"matches model\.embed_tokens, which is a Embedding"),
    "container": ({"targets": r".*layers\.0.*"}, r"matches model\.layers\.0, which is a LlamaDecoderLayer"),
    "rank pattern": ({"rank_pattern": {"query": 4}}, r"lora\.rank_pattern has the key 'query'"),
    "alpha pattern": ({"alpha_pattern": {"query": 4}}, r"lora\.alpha_pattern has the key 'query'"),
    "layer number": ({"layers_to_transform": (1, 7)}, r"lora\.layers_to_transform has 7"),
    "saved module": ({"modules_to_save": ("head",)}, r"lora\.modules_to_save names 'head'.*lm_head x 1"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_find_targets_says_what_matches_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        attach_adapters(model, LoraSpec(**options))
    assert not list(iter_lora(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn",), r".*c_attn"])
def test_find_targets_refuses_conv1d(targets: Any) -> None:
    with pytest.raises(ConfigError, match="Conv1D"):
        find_targets(tiny_gpt2(), LoraSpec(targets=targets))


def test_find_saved_finds_whole_names() -> None:
    assert find_saved(tiny_llama(), LoraSpec(modules_to_save=("lm_head", "norm"))) == ["model.norm", "lm_head"]
