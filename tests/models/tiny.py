"""Tiny random checkpoints of many families, written by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
STRETCHED = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-stretched": LlamaConfig(**SIZES, rope_parameters=STRETCHED),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=128),
    "smollm3": SmolLM3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "granite": GraniteConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, **EXPERTS),
}
DENSE = [name for name in CONFIGS if name not in ("mixtral", "qwen3_moe")]
MIXTURES = ["mixtral", "qwen3_moe"]


def build_tiny(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model whose norms and biases are random too, with `changes` to its configuration."""
    torch.manual_seed(seed)
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def save_tiny(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, shard_size: str = "1GB"
) -> Path:
    """Write a tiny random checkpoint, with a tokenizer, and return its folder."""
    build_tiny(family, dtype=dtype).save_pretrained(folder, max_shard_size=shard_size)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with a chat template."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{n}": n for n in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    )


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def token_ids() -> torch.Tensor:
    """Return a batch of token ids that every tiny model knows."""
    return torch.randint(4, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of `token_ids`, without a cache."""
    return model(input_ids=token_ids(), use_cache=False).logits.float()
