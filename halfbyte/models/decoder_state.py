"""What decoders that prepare a model in advance depend on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.nn.adapter_shelf import adapter_changes
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.token_rows import TokenRows, frozen_original
from halfbyte.nn.vocabulary import unwrapped


def token_dtype(embedding: Any) -> torch.dtype:
    """Return the dtype of what an embedding returns, which need not be that of its weight."""
    original: Any = unwrapped(embedding)
    widened: torch.dtype | None = getattr(original, "compute_dtype", None)
    own: Any = original.weight.dtype
    dtype: torch.dtype = widened or own
    return dtype


def weight_state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return what changes whenever what a decoder has prepared is out of date."""
    embedding: Any = frozen_original(model.get_input_embeddings())
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear)]
    tables = [m for m in model.modules() if isinstance(m, TokenRows)]
    return (
        # What a deleted adapter had in memory, the next one may have.
        adapter_changes(model),
        embedding.weight.data_ptr(),
        *((table.adapter_enabled, _identity(table.rows)) for table in tables),
        *((m.adapter_enabled, m.scaling, *map(_identity, m.adapter().values())) for m in adapted),
    )


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version
