"""Tiny GGUF files made of tiny models, by the gguf package's writer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import torch
from transformers import PreTrainedModel

from tests.models.tiny import CONFIGS, build_tiny

ARCHITECTURES = {
    "llama": "llama",
    "llama-tied": "llama",
    "llama-stretched": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}


def save_tiny_gguf(path: Path, family: str, *, quantization: str = "F32") -> Path:
    """Write a tiny model as llama.cpp's converter would: names, row order and offsets of its architecture."""
    model = build_tiny(family)
    architecture = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, architecture)
    _add_fields(writer, family, model)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = _as_stored(name, tensor.float(), architecture, model)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        # llama.cpp keeps vectors in fp32.
        kind = gguf.GGMLQuantizationType[quantization if values.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_fields(writer: gguf.GGUFWriter, family: str, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_name("mistral" if family == "mistral" else "tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)
    rope = CONFIGS[family].rope_parameters or {}
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "llama3":
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        factors = plain / model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", factors.numpy().astype(numpy.float32))


def _as_stored(name: str, tensor: torch.Tensor, architecture: str, model: PreTrainedModel) -> numpy.ndarray:
    config = model.config
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        num_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor.contiguous().numpy()
