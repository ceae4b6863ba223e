"""Which decoder answers, and who keeps it from one answer to the next.

Recording a step, or expanding a model, takes some tenths of a second, as long as ten to a hundred tokens. Inside
`keep_decoders` the last decoder of a model waits for the next prompts, and serves them if they fit; outside, each
answer has its own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from halfbyte.device import available_bytes
from halfbyte.models.expanded_decoder import ExpandedDecoder, why_not_expanded
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.static_decoder import StaticDecoder, cache_nbytes, why_not_static
from halfbyte.nn import expanded_nbytes

MIN_NEW_TOKENS = 16
"""Recording a step does not pay for fewer."""
MAX_SHARE = 0.8
"""Of the free memory, for the cache."""
MAX_EXPANDED_SHARE = 0.5
"""Of the free memory, for expanded weights."""

Decoder = StaticDecoder | ExpandedDecoder
Kind = TypeVar("Kind", StaticDecoder, ExpandedDecoder)

# Of each model inside `keep_decoders` none, or one that nobody uses just now.
_WAITING: weakref.WeakKeyDictionary[PreTrainedModel, list[Decoder]] = weakref.WeakKeyDictionary()


def decodes_statically(model: PreTrainedModel, *, num_prompts: int, num_tokens: int, num_new_tokens: int) -> bool:
    """Say whether a `StaticDecoder` is the way to answer these prompts."""
    device = compute_device_of(model)
    if device.type != "cuda" or num_new_tokens < MIN_NEW_TOKENS or why_not_static(model, num_prompts) is not None:
        return False
    reusable_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    waiting = [decoder for decoder in _WAITING.get(model, ()) if isinstance(decoder, StaticDecoder)]
    waiting_bytes = sum(decoder.cache_nbytes for decoder in waiting)
    free_bytes = torch.cuda.mem_get_info(device)[0] + reusable_bytes + waiting_bytes
    return cache_nbytes(model, num_prompts, num_tokens) < MAX_SHARE * free_bytes


def decodes_expanded(model: PreTrainedModel) -> bool:
    """Say whether an `ExpandedDecoder` is the way to answer."""
    if why_not_expanded(model) is not None:
        return False
    if any(isinstance(decoder, ExpandedDecoder) for decoder in _WAITING.get(model, ())):
        return True
    return expanded_nbytes(model, dtype=torch.float32) < MAX_EXPANDED_SHARE * available_bytes()


@contextlib.contextmanager
def keep_decoders(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model's decoder inside the `with` block; its memory is free afterwards."""
    if model in _WAITING:
        yield
        return
    _WAITING[model] = []
    try:
        yield
    finally:
        for decoder in _WAITING.pop(model):
            decoder.close()


@contextlib.contextmanager
def borrow_decoder(model: PreTrainedModel, kind: type[Kind], **wanted: Any) -> Iterator[Kind]:
    """Lend a decoder that nobody else uses; arguments beside the model are those of `kind`."""
    waiting = _WAITING.get(model)
    decoder: Decoder | None = waiting.pop() if waiting else None
    if decoder is not None and not (isinstance(decoder, kind) and decoder.serves(model, **wanted)):
        # Before the next one is made, which takes the same memory.
        decoder.close()
        decoder = None
    lent = decoder if isinstance(decoder, kind) else kind(model, **wanted)
    try:
        yield lent
    finally:
        waiting = _WAITING.get(model)
        if waiting is None or waiting:
            lent.close()
        else:
            waiting.append(lent)
