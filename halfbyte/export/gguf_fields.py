"""The fields of a GGUF file that describe the architecture, from transformers' configuration.

llama.cpp knows Mistral models by the name of the llama architecture. Of ways to stretch rotary positions it knows
`linear` and `yarn` by fields; `llama3` it knows by a tensor of quotients, `rope_freqs.weight`. What it does not know is
refused, except a sliding window: within the window a model computes the same without it, so the context ends there.
"""

from __future__ import annotations

from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.export.gguf_file import FieldValue
from halfbyte.models import PretrainedConfig

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# transformers' name of a parameter of yarn, and llama.cpp's.
_YARN_FIELDS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def find_architecture(config: PretrainedConfig) -> str:
    """Return the gguf package's name for a model's architecture.

    Raises:
        ConfigError: Models of this type are not written as GGUF.
    """
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"models of type {config.model_type!r} are not written as GGUF; known: {', '.join(ARCHITECTURES)}"
        )
    if config.hidden_act != "silu":
        raise ConfigError(f"llama.cpp computes {config.model_type} models with silu, not {config.hidden_act!r}")
    return ARCHITECTURES[config.model_type]


def make_model_fields(config: PretrainedConfig) -> dict[str, FieldValue]:
    """Return the fields that describe what a model computes.

    Raises:
        ConfigError: It computes something that llama.cpp does not.
    """
    architecture, head_dim = find_architecture(config), head_width(config)
    fields: dict[str, FieldValue] = {
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": head_dim,
        **_rope_fields(config),
    }
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def head_width(config: PretrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: PretrainedConfig) -> int:
    """Return how many tokens llama.cpp reads as the model would."""
    window = sliding_window(config)
    return min(config.max_position_embeddings, window) if window else config.max_position_embeddings


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return how many tokens back a model looks, None where it looks at all."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary parameters of a configuration."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def _rope_fields(config: PretrainedConfig) -> dict[str, FieldValue]:
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    fields: dict[str, FieldValue] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("default", "llama3"):
        return fields
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"rotary positions are stretched by {kind!r}, which llama.cpp does not do for this model")
    fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        fields["rope.scaling.original_context_length"] = int(original)
        unknown = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]
        if unknown or rope.get("truncate") is False:
            raise ConfigError(f"yarn with {', '.join(unknown) or 'truncate'} cannot be said in a GGUF file")
        fields |= {f"rope.scaling.{ours}": float(rope[name]) for name, ours in _YARN_FIELDS.items() if rope.get(name)}
    return fields
