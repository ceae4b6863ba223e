"""Whether frozen weights can be multiplied in fp8, where that was asked for."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.models.fused_layers import FusionReport, iter_decoder_layers
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.packed_inputs import compute_dtype_of
from halfbyte.nn.linear import Linear4bit
from halfbyte.ops.e4m3 import why_no_fp8
from halfbyte.ops.product_fp8 import SIZE_MULTIPLE


def check_fp8(model: PreTrainedModel, fusion: FusionReport | None) -> str:
    """Return a note for people, or refuse.

    Args:
        model: To be trained, its layers fused where they fit.
        fusion: What became of its layers; None where fused blocks are off.

    Raises:
        ConfigError: Products in fp8 were asked for and cannot be.
    """
    reason = _why_not(model, fusion)
    if reason is not None:
        raise ConfigError(f"train.fp8 cannot be honoured: {reason}; leave it out")
    return "frozen weights: multiplied in fp8, adapters in 16 bits"


def _why_not(model: PreTrainedModel, fusion: FusionReport | None) -> str | None:
    if fusion is None:
        return "only fused blocks multiply in fp8, and they are off"
    if not fusion.num_fused:
        return f"only fused blocks multiply in fp8; {fusion}"
    reason = why_no_fp8(compute_device_of(model))
    if reason is not None:
        return reason
    dtype = compute_dtype_of(model)
    if dtype != torch.bfloat16:
        return f"the other products are in {str(dtype).removeprefix('torch.')}, and fp8 goes with bfloat16"
    return _why_sizes_do_not_fit(model)


def _why_sizes_do_not_fit(model: PreTrainedModel) -> str | None:
    for layer in iter_decoder_layers(model):
        for name, module in layer.named_modules():
            if isinstance(module, (Linear4bit, nn.Linear)) and (
                module.in_features % SIZE_MULTIPLE or module.out_features % SIZE_MULTIPLE
            ):
                size = f"{module.out_features} x {module.in_features}"
                return f"{name} is {size}, and fp8 products want multiples of {SIZE_MULTIPLE}"
    return None
