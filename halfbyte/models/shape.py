"""The sizes of any model that transformers knows, for plans."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from halfbyte.errors import ConfigError
from halfbyte.memory.model_shape import FUSABLE_TYPES, ModelShape
from halfbyte.models.build import build_meta_model
from halfbyte.models.describe import load_config
from halfbyte.models.hub import download_file, is_hub_file, is_hub_id
from halfbyte.models.load import quantizable_layers
from halfbyte.models.source import load_config_dict, resolve_source

NEEDED_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def read_shape(path: str, revision: str | None = None) -> ModelShape:
    """Return the sizes of a model; of a hub id only config.json is downloaded.

    Args:
        path: Hub id, folder, config.json or weight file.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ConfigError: Nothing is there, or no sizes can be read from it.
        FormatError: It cannot be read.
    """
    found = Path(path).expanduser()
    if not found.exists() and is_hub_id(path) and not is_hub_file(path):
        found = download_file(f"{path}/config.json", revision)
    folder = found.parent if found.suffix == ".json" else found
    if folder.is_dir():
        load_config_dict(folder)
        return shape_of(AutoConfig.from_pretrained(folder), name=path)
    return shape_of(load_config(resolve_source(path, revision)), name=path)


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
