"""Models without weights: transformers builds them on the meta device, where a tensor is a shape and nothing else.

What no checkpoint holds must then be computed: buffers such as rotary frequencies. The family's own initialisation
does that. We give each such module real buffers filled with a value that no initialisation leaves (NaN, or the
smallest integer), run the family's initialisation of that module alone, and refuse a model in which any of it survived.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halfbyte.errors import FormatError
from halfbyte.models.attention import PACKED_ATTENTION, register_packed_attention


def build_meta_model(
    config: PretrainedConfig, *, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build the causal language model of a config on the meta device.

    Raises:
        FormatError: transformers has no causal language model of this type.
    """
    if attn_implementation == PACKED_ATTENTION:
        register_packed_attention()
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    # transformers writes dtype and attention into the config that it is given.
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise FormatError(
            f"models of type {config.model_type!r} are no causal language models in transformers"
        ) from error


def init_computed_buffers_(model: PreTrainedModel, device: torch.device) -> None:
    """Give every buffer that no checkpoint holds its value, on `device`.

    Raises:
        FormatError: The family's initialisation leaves one of them unset.
    """
    for owner, path, module in _modules_with_computed_buffers(model):
        names = sorted(module._non_persistent_buffers_set & {n for n, b in module._buffers.items() if b is not None})
        for name in names:
            module._buffers[name] = _poisoned(module._buffers[name])
        # The guards of transformers' initialisation skip parameters with this mark.
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        with torch.no_grad():
            owner._init_weights(module)
        for name in names:
            buffer = module._buffers[name]
            if buffer is None or _is_poisoned(buffer):
                raise FormatError(f"{type(model).__name__}: its initialisation does not set {path}.{name}")
            module._buffers[name] = buffer.to(device)


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return the module names that the family wants in fp32 when computing in `dtype`."""
    names = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    return sorted(names | set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else names)


def _modules_with_computed_buffers(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, str, nn.Module]]:
    """Yield (model that initialises it, path, module) for each module with buffers that no checkpoint holds."""
    owners: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        owner = module if isinstance(module, PreTrainedModel) else owners[parent]
        owners[path] = owner
        if any(module._buffers.get(name) is not None for name in module._non_persistent_buffers_set):
            yield owner, path, module


def _poisoned(buffer: torch.Tensor | None) -> torch.Tensor:
    assert buffer is not None
    if buffer.dtype == torch.bool:
        # Neither value of a bool can stand for "unset".
        return torch.zeros(buffer.shape, dtype=buffer.dtype)
    unset = float("nan") if buffer.dtype.is_floating_point else torch.iinfo(buffer.dtype).min
    return torch.full(buffer.shape, unset, dtype=buffer.dtype)


def _is_poisoned(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool:
        return False
    if buffer.dtype.is_floating_point:
        return bool(buffer.isnan().any())
    return bool((buffer == torch.iinfo(buffer.dtype).min).any())
