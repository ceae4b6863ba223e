"""Training steps on random models of other shapes than Llama-7B's: nothing may be tuned to one.

Grouped heads and a vocabulary of 128k (Llama-3-8B), biases (Qwen2.5-7B), norms of queries and keys (Qwen3-4B), a 1B
and a small model, and Llama-7B with one long row and with many rows. Settings as in `bench_train`, dropout 0.05,
activations by the trainer's own choice, which is to keep them, and once put away in host memory. On a GPU only.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from benchmarks.bench_train import LLAMA_7B, SMOLLM2_135M, Setting, measure_speed
from halfbyte.device import default_compute_dtype
from halfbyte.models.attention import PACKED_ATTENTION, register_packed_attention
from halfbyte.nn import quantize_linears_
from halfbyte.quant import QuantSpec


def _sizes(width: int, ff_width: int, layers: int, heads: int, key_heads: int, words: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (width, ff_width, layers, heads, key_heads), strict=True)) | {"vocab_size": words}


SHAPES: dict[str, PreTrainedConfig] = {
    "Llama-3-8B": LlamaConfig(**_sizes(4096, 14336, 32, 32, 8, 128256), rope_theta=500000.0),
    "Qwen2.5-7B": Qwen2Config(**_sizes(3584, 18944, 28, 28, 4, 152064)),
    "Qwen3-4B": Qwen3Config(**_sizes(2560, 9728, 36, 32, 8, 151936), head_dim=128, tie_word_embeddings=True),
    "Llama-3.2-1B": LlamaConfig(**_sizes(2048, 8192, 16, 32, 8, 128256), head_dim=64, tie_word_embeddings=True),
    "SmolLM2-135M": LlamaConfig(**SMOLLM2_135M),
    "Llama-7B": LlamaConfig(**LLAMA_7B),
}
SIZES: dict[str, list[tuple[int, int, str]]] = {
    "Llama-7B": [(1, 8192, "auto"), (16, 1024, "auto"), (16, 1024, "offload")]
}


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield the speed of training each shape."""
    if device.type != "cuda":
        return
    for name, config in SHAPES.items():
        for (batch, seq, kept), fused in itertools.product(SIZES.get(name, [(4, 1024, "auto")]), (True, False)):
            if not fused and name != "SmolLM2-135M":
                continue
            model = build(config, device)
            setting = Setting(batch=batch, seq=seq, steps=6, accumulation=2, checkpointing=kept, fused=fused)
            yield {"model": f"{name} shape"} | measure_speed(model, setting)
            del model
            gc.collect()


def build(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Return a random model in 4 bits."""
    register_packed_attention()
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=default_compute_dtype(device), attn_implementation=PACKED_ATTENTION
        )
        quantize_linears_(model, QuantSpec())
    return model
