"""Turn a model in memory with adapters on 4-bit weights into a plain one in 16 bits.

The adapter is added to the dequantised weights in fp32 and the sum is rounded fairly (see `rounding`). Rounding it back
to 4 bits, as PEFT does, would lose the update: it is far smaller than the distance of two codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from halfbyte.export.base_rows import iter_base_rows, update_of_rows
from halfbyte.export.rounding import generator_for, round_fairly
from halfbyte.models import PreTrainedModel
from halfbyte.models.half_storage import HalfEmbedding, HalfHead
from halfbyte.models.host_embedding import HostEmbedding
from halfbyte.nn import Linear4bit, LoraLinear, SavedModule
from halfbyte.nn.convert import replace_module
from halfbyte.nn.token_rows import RowsEmbedding, RowsHead, TokenRows
from halfbyte.ops import dequantize_4bit

_WIDENING = (HalfEmbedding, HostEmbedding, HalfHead)


@torch.no_grad()
def merge_in_place(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Merge every adapter of `model` and dequantise what is left in 4 bits.

    Args:
        model: Changed in place: afterwards it has transformers' own modules only, and nothing of ours.
        dtype: Of the result; that of the original weights where it is 16-bit, else bfloat16.

    Returns:
        The same model.
    """
    dtype = dtype or _half_dtype(model)
    saved = {path for path, module in model.named_modules() if isinstance(module, SavedModule)}
    if any(name.rpartition(".")[0] in saved for pair in model.all_tied_weights_keys.items() for name in pair):
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys.clear()
    words: dict[TokenRows, nn.Parameter] = {}
    for path, module in list(_outermost(model)):
        plain: Any = _plain(path, module, dtype)
        if isinstance(module, (RowsEmbedding, RowsHead)):
            # One table, one weight: embedding and head stay tied.
            plain.weight = words.setdefault(module.table, plain.weight)
        replace_module(model, path, plain)
    # Parameters only: buffers such as rotary frequencies stay in fp32. Setting .data keeps tied ones tied.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of what is ours, wrappers without what is inside them."""
    ours = (LoraLinear, SavedModule, RowsEmbedding, RowsHead, Linear4bit, HalfEmbedding, HostEmbedding, HalfHead)
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, ours) and not any(path.startswith(f"{outer}.") for outer in inside):
            inside.append(path)
            yield path, module


def _plain(path: str, module: nn.Module, dtype: torch.dtype) -> Any:
    if isinstance(module, SavedModule):
        trained = module.trained
        return _plain(path, trained, dtype) if isinstance(trained, (HalfEmbedding, HalfHead)) else trained.to(dtype)
    if isinstance(module, (RowsEmbedding, RowsHead)):
        return _with_rows(path, module, dtype)
    if isinstance(module, (HalfEmbedding, HostEmbedding)):
        embedding = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
        embedding.weight = module.weight
        if isinstance(module, HostEmbedding):
            embedding.weight = nn.Parameter(module.weight.to(module.compute_device), requires_grad=False)
        return embedding
    if isinstance(module, HalfHead):
        plain = _linear(module.weight, module.bias)
        plain.weight = module.weight
        return plain
    if isinstance(module, LoraLinear):
        return _linear(_merged(path, module, dtype), module.base.bias)
    assert isinstance(module, Linear4bit)
    return _linear(dequantize_4bit(module.quantized, dtype=dtype), module.bias)


def _with_rows(path: str, module: RowsEmbedding | RowsHead, dtype: torch.dtype) -> Any:
    original: Any = module.original
    plain: Any = _plain(path, original, dtype) if isinstance(original, _WIDENING) else original
    plain.weight = nn.Parameter(module.table.put_over(plain.weight.detach()), requires_grad=False)
    setattr(plain, "num_embeddings" if isinstance(module, RowsEmbedding) else "out_features", module.table.vocabulary)
    return plain


def _merged(path: str, module: LoraLinear, dtype: torch.dtype) -> torch.Tensor:
    base = module.base.quantized if isinstance(module.base, Linear4bit) else module.base.weight
    merged = torch.empty(module.out_features, module.in_features, dtype=dtype, device=module.lora_A.device)
    generator = generator_for(f"{path}.weight")
    for rows, values in iter_base_rows(base):
        magnitude = module.lora_magnitude_vector
        update = update_of_rows(
            values,
            module.lora_A,
            module.lora_B[rows],
            scaling=module.scaling,
            magnitude=None if magnitude is None else magnitude[rows],
        )
        merged[rows] = round_fairly((values + update).cpu(), dtype, generator=generator)
    return merged


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def _half_dtype(model: nn.Module) -> torch.dtype:
    dtypes = [module.quantized.dtype for module in model.modules() if isinstance(module, Linear4bit)]
    dtypes += [parameter.dtype for parameter in model.parameters()]
    return next((found for found in dtypes if found in (torch.float16, torch.bfloat16)), torch.bfloat16)
