"""Shapes of well-known models, as their config.json gives them."""

from __future__ import annotations

from typing import Any

from halfbyte.memory.model_shape import ModelShape


def _config(model_type: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return {"model_type": model_type, **dict(zip(names, sizes, strict=True)), **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _config("llama", (576, 1536, 30, 9, 3, 49152), tie_word_embeddings=True),
    "Llama-3.2-1B": _config("llama", (2048, 8192, 16, 32, 8, 128256), tie_word_embeddings=True, head_dim=64),
    "Qwen3-4B": _config("qwen3", (2560, 9728, 36, 32, 8, 151936), tie_word_embeddings=True, head_dim=128),
    "Llama-7B": _config("llama", (4096, 11008, 32, 32, 32, 32000)),
    "Qwen2.5-7B": _config("qwen2", (3584, 18944, 28, 28, 4, 152064)),
    "Llama-3-8B": _config("llama", (4096, 14336, 32, 32, 8, 128256)),
    "Llama-13B": _config("llama", (5120, 13824, 40, 40, 40, 32000)),
    "Llama-65B": _config("llama", (8192, 22016, 80, 64, 64, 32000)),
}


def shape_of(name: str) -> ModelShape:
    """Return a shape by name."""
    return ModelShape.from_config(CONFIGS[name], name=name)
