from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from halfbyte.models.cache_name import BEFORE, NOW, cache_name
from halfbyte.models.fused_layers import fuse_layers_
from tests.models.tiny import build_tiny


class _Before:
    def forward(self, x: int, past_key_values: object = None) -> None: ...


class _Now:
    def forward(self, x: int, cache: object = None) -> None: ...


def test_cache_name_is_what_the_forward_takes() -> None:
    assert cache_name(_Before) == cache_name(_Before()) == BEFORE
    assert cache_name(_Now) == cache_name(_Now()) == NOW


@pytest.mark.parametrize("name", [BEFORE, NOW])
@torch.no_grad()
def test_a_fused_layer_fills_a_cache_under_either_name(name: str) -> None:
    model: PreTrainedModel = build_tiny("llama").requires_grad_(False)
    assert fuse_layers_(model).num_fused == 2
    cache = DynamicCache(config=model.config)
    x, ids = torch.randn(1, 3, 64), torch.arange(3)[None]
    angles = model.model.rotary_emb(x, position_ids=ids)
    layer = model.model.layers[0]
    out = layer(x, position_ids=ids, position_embeddings=angles, **{name: cache})
    assert cache.get_seq_length() == 3
    assert layer(x, None, ids, cache, position_embeddings=angles).shape == out.shape
    assert cache.get_seq_length() == 6
