"""Random models of any size in 4 bits, made without their 16-bit weights ever existing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from halfbyte.device import default_compute_dtype
from halfbyte.models.attention import PACKED_ATTENTION
from halfbyte.models.build import build_meta_model, init_computed_buffers_
from halfbyte.models.load import quantizable_layers
from halfbyte.models.streaming import SlabFiller
from halfbyte.nn.convert import replace_module, workspace_of
from halfbyte.nn.linear import Linear4bit
from halfbyte.quant import QuantizedTensor

BLOCK_SIZE, ABSMAX_GROUP = 64, 256
# Of the weights, as common initialisations have it.
WEIGHT_STD = 0.02


def build_random_4bit(
    config: PreTrainedConfig,
    device: torch.device,
    *,
    streamed_blocks: int = 0,
    spill_folder: Path | None = None,
    on_cards: bool = False,
) -> PreTrainedModel:
    """Return a model whose 4-bit codes and scales are drawn at random.

    Args:
        config: Of the model.
        device: Where it computes.
        streamed_blocks: How many blocks' weights live in host memory.
        spill_folder: Where those lie in files instead.
        on_cards: Whether they are divided among the cards of this host's ranks instead.
    """
    dtype = default_compute_dtype(device)
    model = build_meta_model(config, dtype=dtype, attn_implementation=PACKED_ATTENTION)
    paths = quantizable_layers(model, config)
    slabs = None
    if streamed_blocks:
        slabs = SlabFiller(
            model, targets=paths, count=streamed_blocks, device=device, spill_folder=spill_folder, on_cards=on_cards
        )
    weights: dict[str, QuantizedTensor] = {}

    def siblings(block: str) -> int:
        return sum(path.startswith(f"{block}.") for path in paths)

    for path in sorted(paths):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weights[path] = draw_weight((linear.out_features, linear.in_features), dtype, device)
        if slabs is not None:
            weights |= slabs.take(path, weights[path], siblings=siblings)
    for path, q in weights.items():
        linear = model.get_submodule(path)
        bias = None if linear.bias is None else torch.zeros(linear.bias.shape, dtype=dtype, device=device)
        replace_module(model, path, Linear4bit.from_quantized(q, bias, workspace_of(model)))
    if slabs is not None:
        slabs.finish_(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.ones if parameter.dim() == 1 else torch.randn
                made = value(parameter.shape, dtype=dtype, device=device) * (1 if parameter.dim() == 1 else WEIGHT_STD)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    init_computed_buffers_(model, device)
    return model.requires_grad_(False)


def draw_weight(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> QuantizedTensor:
    """Return a random weight in NF4 with double quantisation."""
    numel = shape[0] * shape[1]
    num_blocks = -(-numel // BLOCK_SIZE)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(256, (count,), dtype=torch.uint8, device=device)

    # The largest of 64 normal numbers is some 2.4 standard deviations, and scales differ by a fifth of that.
    return QuantizedTensor(
        packed=draw(-(-numel // 2)),
        absmax=draw(num_blocks),
        absmax_scale=torch.full((-(-num_blocks // ABSMAX_GROUP),), 0.5 * WEIGHT_STD, device=device),
        absmax_offset=torch.tensor(2.4 * WEIGHT_STD, device=device),
        codebook="nf4",
        block_size=BLOCK_SIZE,
        shape=shape,
        dtype=dtype,
    )
