"""Who keeps a model's `StaticDecoder` from one answer to the next.

Recording a step takes some tenths of a second, as long as a hundred tokens. Inside `keep_decoders` the last decoder of
a model waits for the next prompts, and serves them if they fit; outside, each answer has its own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from halfbyte.models.static_decoder import StaticDecoder, cache_nbytes, why_not_static

MIN_NEW_TOKENS = 16
"""Recording a step does not pay for fewer."""
MAX_SHARE = 0.8
"""Of the free memory, for the cache."""

# Of each model inside `keep_decoders` none, or one that nobody uses just now.
_WAITING: weakref.WeakKeyDictionary[PreTrainedModel, list[StaticDecoder]] = weakref.WeakKeyDictionary()


def decodes_statically(model: PreTrainedModel, *, num_prompts: int, num_tokens: int, num_new_tokens: int) -> bool:
    """Say whether a `StaticDecoder` is the way to answer these prompts."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    device = embedding.device
    if device.type != "cuda" or num_new_tokens < MIN_NEW_TOKENS or why_not_static(model, num_prompts) is not None:
        return False
    reusable_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    waiting_bytes = sum(decoder.cache_nbytes for decoder in _WAITING.get(model, ()))
    free_bytes = torch.cuda.mem_get_info(device)[0] + reusable_bytes + waiting_bytes
    return cache_nbytes(model, num_prompts, num_tokens) < MAX_SHARE * free_bytes


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
def borrow_decoder(
    model: PreTrainedModel, *, num_prompts: int, num_tokens: int, greedy: bool
) -> Iterator[StaticDecoder]:
    """Lend a decoder that nobody else uses; arguments as those of `StaticDecoder`."""
    waiting = _WAITING.get(model)
    decoder = waiting.pop() if waiting else None
    if decoder is not None and not decoder.serves(model, num_prompts=num_prompts, num_tokens=num_tokens, greedy=greedy):
        # Before the next one is made, which takes the same memory.
        decoder.close()
        decoder = None
    if decoder is None:
        decoder = StaticDecoder(model, num_prompts=num_prompts, num_tokens=num_tokens, greedy=greedy)
    try:
        yield decoder
    finally:
        waiting = _WAITING.get(model)
        if waiting is None or waiting:
            decoder.close()
        else:
            waiting.append(decoder)
