"""The sizes of any model that transformers knows, for plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from halfbyte.errors import ConfigError
from halfbyte.memory.model_shape import FUSABLE_TYPES, ModelShape
from halfbyte.models.build import build_meta_model
from halfbyte.models.load import quantizable_layers

NEEDED_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def shape_of(config: PretrainedConfig, *, name: str) -> ModelShape:
    """Return the sizes of a model: from its configuration where that tells all, else from its modules, without weights.

    Args:
        config: Of the model.
        name: What to call it.

    Raises:
        ConfigError: It lacks a size, or has one that makes no sense.
    """
    if config.model_type in FUSABLE_TYPES:
        return ModelShape.from_config(config.to_dict(), name=name)
    text: Any = config.get_text_config(decoder=True)
    if not all(isinstance(getattr(text, field, None), int) for field in NEEDED_FIELDS):
        raise ConfigError(f"{name}: its configuration lacks one of {', '.join(NEEDED_FIELDS)}")
    model = build_meta_model(config, dtype=torch.bfloat16)
    shape = ModelShape(
        name=name,
        model_type=str(config.model_type),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        ff_width=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query_heads=text.num_attention_heads,
        key_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        ties_embedding=bool(model.all_tied_weights_keys),
        context=getattr(text, "max_position_embeddings", None),
        is_fusable=False,
    )
    # Averages over blocks, which need not be equal.
    linears = [model.get_submodule(path) for path in quantizable_layers(model, config)]
    numbers = sum(linear.weight.numel() for linear in linears if isinstance(linear, nn.Linear))
    shape = dataclasses.replace(shape, other_linear_numbers=numbers // shape.layers - shape.block_weights)
    total = sum(parameter.numel() for parameter in model.parameters())
    return dataclasses.replace(shape, other_numbers=total - shape.num_parameters)
