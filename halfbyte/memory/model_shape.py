"""The sizes of a model that decide how much memory it takes and how long it computes, read from a config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from halfbyte.errors import ConfigError

# model_type of configurations whose layers fused blocks compute.
FUSABLE_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Multimodal models keep the language model's sizes one level deeper.
NESTED_KEYS = ("text_config", "language_config", "llm_config")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder: blocks of attention and a gated MLP between an embedding and a head."""

    name: str
    """What people call it."""
    model_type: str
    """As config.json has it."""
    layers: int
    """Number of decoder blocks."""
    width: int
    """Numbers that describe a token between blocks."""
    ff_width: int
    """Numbers between the two products of the MLP."""
    query_heads: int
    key_heads: int
    head_width: int
    """Numbers of a head."""
    vocabulary: int
    """Words that the head tells apart."""
    ties_embedding: bool = False
    """Whether the head is the embedding."""
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_head_norms: bool = False
    """Whether queries and keys are normed."""
    window: int | None = None
    """Tokens that attention looks back, if not all."""
    context: int | None = None
    """Tokens that the model was made for."""
    is_fusable: bool = True
    """Whether fused blocks compute its layers. If not, every figure of it is rougher."""
    other_linear_numbers: int = 0
    """Linear weights of a block beside its seven projections; negative where it has fewer."""
    other_numbers: int = 0
    """Weights that stay in 16 bits beside embedding, head, norms and biases."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str = "model") -> ModelShape:
        """Read the sizes that a config.json gives for a model of the Llama family.

        Args:
            config: What the file holds.
            name: What to call the model.

        Raises:
            ConfigError: It is of another family, or a size is missing or makes no sense.
        """
        model_type = str(config.get("model_type"))
        if model_type not in FUSABLE_TYPES:
            nested = next((config[key] for key in NESTED_KEYS if isinstance(config.get(key), Mapping)), None)
            if nested is None or nested.get("model_type") not in FUSABLE_TYPES:
                raise ConfigError(
                    f"{name}: sizes of model_type {model_type!r} cannot be read from its configuration alone; known: "
                    f"{', '.join(FUSABLE_TYPES)}"
                )
            model_type = str(nested["model_type"])
            config = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **nested}
        read = _Reader(config, name)
        width, query_heads = read.size("hidden_size"), read.size("num_attention_heads")
        # What transformers takes where the file is silent.
        head_width = read.size("head_dim", default=128 if model_type == "qwen3" else width // query_heads)
        key_heads = read.size("num_key_value_heads", default=4 if model_type == "smollm3" else query_heads)
        ties_by_default = model_type == "smollm3"
        window = config.get("sliding_window") if config.get("use_sliding_window", model_type == "mistral") else None
        return cls(
            name=name,
            model_type=model_type,
            layers=read.size("num_hidden_layers"),
            width=width,
            ff_width=read.size("intermediate_size"),
            query_heads=query_heads,
            key_heads=key_heads,
            head_width=head_width,
            vocabulary=read.size("vocab_size"),
            ties_embedding=bool(config.get("tie_word_embeddings", ties_by_default)),
            has_qkv_bias=model_type == "qwen2" or bool(config.get("attention_bias")),
            has_o_bias=model_type != "qwen2" and bool(config.get("attention_bias")),
            has_head_norms=model_type == "qwen3",
            window=window,
            context=config.get("max_position_embeddings"),
        )

    @property
    def qkv_width(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.query_heads + 2 * self.key_heads) * self.head_width

    @property
    def attention_width(self) -> int:
        """Numbers of a token that attention returns."""
        return self.query_heads * self.head_width

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) features of each projection of a block."""
        key_width, width, ff_width = self.key_heads * self.head_width, self.width, self.ff_width
        shapes = (
            (self.attention_width, width),
            (key_width, width),
            (key_width, width),
            (width, self.attention_width),
            (ff_width, width),
            (ff_width, width),
            (width, ff_width),
        )
        return dict(zip(PROJECTIONS, shapes, strict=True))

    @property
    def block_weights(self) -> int:
        """Linear weights of a block."""
        return sum(out * in_ for out, in_ in self.projection_shapes.values()) + self.other_linear_numbers

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding, and as many of the head where it is another."""
        return self.vocabulary * self.width

    @property
    def norm_numbers(self) -> int:
        """Weights of all norms, and biases."""
        heads = 2 * self.head_width if self.has_head_norms else 0
        biases = self.has_qkv_bias * self.qkv_width + self.has_o_bias * self.width
        return self.layers * (2 * self.width + heads + biases) + self.width

    @property
    def num_parameters(self) -> int:
        """All weights of the model."""
        embeddings = self.embedding_weights * (1 if self.ties_embedding else 2)
        return self.layers * self.block_weights + embeddings + self.norm_numbers + self.other_numbers


class _Reader:
    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def size(self, field: str, *, default: int | None = None) -> int:
        value = self.config.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = "is missing" if value is None else f"is {value!r}"
            raise ConfigError(f"{self.name}: {field} of its config.json {what}; it must be a whole number above 0")
        return value
