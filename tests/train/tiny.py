"""Tiny random models of several families, with the oddities that training has to cope with."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=False),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, **LAYERS, query_pre_attn_scalar=16, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**SIZES, **LAYERS, query_pre_attn_scalar=16),
}


def build_tiny(family: str, *, attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """Return a random fp32 model of this family, in train mode as from_config leaves it."""
    torch.manual_seed(seed)
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Random weights as they are initialised make attention nearly uniform; larger ones let a wrong mask show.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(6.0)
    return model
