"""Embedding and output head made larger: as whole matrices, for models that are written and for scripts that ask so.

Training needs none of it, see `halfbyte.nn.token_rows`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.nn.vocabulary import find_vocabulary, set_vocabulary_size


def padded_vocabulary(size: int, base: int, multiple: int) -> int:
    """Return the words that whole matrices get: a multiple, unless those of the base are enough."""
    return base if size <= base else -(-size // multiple) * multiple


@torch.no_grad()
def resize_vocabulary_(model: PreTrainedModel, size: int) -> None:
    """Give embedding and head `size` rows: new ones are the mean of those that are there, surplus ones are cut off.

    Args:
        model: Without adapters, on any device.
        size: Words from now on.

    Raises:
        ConfigError: The head is in 4 bits or has a bias.
    """
    words = find_vocabulary(model)
    if words is None:
        raise ConfigError(f"{type(model).__name__} does not show its embedding, so its vocabulary cannot be resized")
    if size != words.size:
        made: dict[str, nn.Parameter] = {}
        for path in words.paths:
            module: Any = model.get_submodule(path)
            if not isinstance(module.weight, nn.Parameter) or getattr(module, "bias", None) is not None:
                raise ConfigError(f"{path} is in 4 bits or has a bias, so the vocabulary cannot be resized")
            owner = words.owner(path)
            if owner not in made:
                made[owner] = nn.Parameter(grown_rows(module.weight.detach(), size), requires_grad=False)
            module.weight = made[owner]
            setattr(module, "num_embeddings" if path == words.embedding else "out_features", size)
    set_vocabulary_size(model, size)


def grown_rows(weight_VD: torch.Tensor, size: int) -> torch.Tensor:
    """Return a weight of `size` rows, those that are not there being the mean of the others."""
    if size <= weight_VD.shape[0]:
        return weight_VD[:size].clone()
    mean_1D = weight_VD.mean(0, dtype=torch.float32).to(weight_VD.dtype)[None]
    return torch.cat([weight_VD, mean_1D.expand(size - weight_VD.shape[0], -1)])
