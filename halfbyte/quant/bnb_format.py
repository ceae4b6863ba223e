"""bitsandbytes' 4-bit state-dict layout: the dictionary between its words and ours.

A linear layer `P` whose weight W has the shape (N, K) is stored as

    P.weight                               packed codes, uint8 [N*K/2, 1]; or the same bytes viewed as a wider dtype
    P.weight.absmax                        fp32 [blocks]; uint8 with double quantisation
    P.weight.quant_map                     fp32 [16], the codebook
    P.weight.nested_absmax                 fp32 [ceil(blocks / 256)], our absmax_scale   (double quantisation)
    P.weight.nested_quant_map              fp32 [256], the dynamic map                   (double quantisation)
    P.weight.quant_state.bitsandbytes__nf4 uint8, the UTF-8 bytes of a JSON object       (or __fp4)

The JSON object carries quant_type, blocksize, dtype and shape, and with double quantisation nested_blocksize,
nested_dtype and nested_offset (our absmax_offset). Biases and everything else are ordinary tensors.

Writing gives the very bytes that bitsandbytes writes. Reading checks every length against the shape in the JSON, so a
damaged file is an error that names the key, not garbage weights. The two maps stored in the file must equal ours to
1e-6: releases of bitsandbytes differ by a rounding in how they compute them, and anything further off is another
format.

Seen in bitsandbytes 0.50.2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from halfbyte.errors import FormatError
from halfbyte.quant.codebooks import codebook_values, dynamic_map
from halfbyte.quant.tensor import ABSMAX_GROUP, BLOCK_SIZES, CODEBOOKS, QuantizedTensor, QuantSpec

# The JSON has some 200 bytes.
MAX_STATE_BYTES = 1 << 16
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_STATE_SUFFIXES = {codebook: f".quant_state.bitsandbytes__{codebook}" for codebook in CODEBOOKS}
_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATE_SUFFIXES.values())


def export_state_dict(
    prefix: str, q: QuantizedTensor, *, storage_dtype: torch.dtype = torch.uint8
) -> dict[str, torch.Tensor]:
    """Return the tensors that bitsandbytes stores for one 4-bit weight.

    Args:
        prefix: Path of the layer, without or with its trailing dot; may be empty.
        q: The weight in 4 bits.
        storage_dtype: What the packed bytes are viewed as (bitsandbytes' quant_storage); sharded training wants bf16.

    Raises:
        FormatError: The packed bytes are no whole number of `storage_dtype` elements.
    """
    key = _weight_key(prefix)
    if q.packed.numel() % storage_dtype.itemsize:
        raise FormatError(f"{key}: {q.packed.numel()} bytes cannot be stored as {storage_dtype}; use torch.uint8")
    state: dict[str, Any] = {
        "quant_type": q.codebook,
        "blocksize": q.block_size,
        "dtype": _DTYPE_NAMES[q.dtype],
        "shape": list(q.shape),
    }
    tensors = {
        key: q.packed.view(storage_dtype).unsqueeze(1),
        f"{key}.absmax": q.absmax,
        f"{key}.quant_map": codebook_values(q.codebook).clone(),
    }
    if q.absmax_scale is not None and q.absmax_offset is not None:
        state["nested_blocksize"] = ABSMAX_GROUP
        state["nested_dtype"] = "float32"
        state["nested_offset"] = q.absmax_offset.item()
        tensors[f"{key}.nested_absmax"] = q.absmax_scale
        tensors[f"{key}.nested_quant_map"] = dynamic_map(signed=True).clone()
    state_bytes = bytearray(json.dumps(state), "utf-8")
    tensors[key + _STATE_SUFFIXES[q.codebook]] = torch.frombuffer(state_bytes, dtype=torch.uint8)
    return tensors


def load_quantized(prefix: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """Read one 4-bit weight from bitsandbytes' tensors.

    Args:
        prefix: Path of the layer, without or with its trailing dot; may be empty.
        tensors: A mapping that holds at least this layer's keys; only those are looked up.

    Raises:
        FormatError: A key is missing, or a tensor disagrees with the shape or format that the JSON states.
    """
    key = _weight_key(prefix)
    state = _read_state(key, tensors)
    shape, block_size, codebook = tuple(state["shape"]), state["blocksize"], state["quant_type"]
    numel = math.prod(shape)
    num_blocks = -(-numel // block_size)

    packed = _lookup(key, tensors).contiguous().view(-1).view(torch.uint8)
    _check_length(key, packed, (numel + 1) // 2)
    absmax = _lookup(f"{key}.absmax", tensors)
    _check_length(f"{key}.absmax", absmax, num_blocks)
    _check_map(f"{key}.quant_map", tensors, codebook_values(codebook))

    scale = offset = None
    if "nested_offset" in state:
        if state.get("nested_blocksize") != ABSMAX_GROUP:
            raise FormatError(
                f"{key}: nested_blocksize is {state.get('nested_blocksize')}; only {ABSMAX_GROUP} is known"
            )
        stored_scale = _lookup(f"{key}.nested_absmax", tensors)
        _check_length(f"{key}.nested_absmax", stored_scale, -(-num_blocks // ABSMAX_GROUP))
        scale = stored_scale.float()
        _check_map(f"{key}.nested_quant_map", tensors, dynamic_map(signed=True))
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
    expected_dtype = torch.float32 if scale is None else torch.uint8
    if absmax.dtype != expected_dtype:
        raise FormatError(f"{key}.absmax has dtype {absmax.dtype}; expected {expected_dtype}")
    return QuantizedTensor(
        packed=packed,
        absmax=absmax,
        absmax_scale=scale,
        absmax_offset=offset,
        codebook=codebook,
        block_size=block_size,
        shape=shape,
        dtype=_DTYPES[state["dtype"]],
    )


def is_quantized_key(key: str) -> bool:
    """Say whether a checkpoint key is a companion of a 4-bit weight (its scales, maps or JSON), not a weight itself."""
    return key.endswith(tuple("weight" + suffix for suffix in _SUFFIXES))


def quantized_prefixes(keys: Iterable[str]) -> list[str]:
    """Return the paths of the layers whose weights are stored in 4 bits, in the order of their keys."""
    endings = tuple("weight" + suffix for suffix in _STATE_SUFFIXES.values())
    prefixes = (key[: -len(ending)] for key in keys for ending in endings if key.endswith(ending))
    return [prefix.removesuffix(".") for prefix in prefixes]


def config_entry(
    spec: QuantSpec,
    compute_dtype: torch.dtype,
    *,
    storage_dtype: torch.dtype = torch.uint8,
    skip_modules: list[str] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` of a config.json whose weights are stored in this layout.

    Args:
        spec: How the weights are quantised. The block size has no field here; every weight's JSON carries it.
        compute_dtype: What transformers shall multiply in.
        storage_dtype: As given to `export_state_dict`.
        skip_modules: Names of linear layers left in 16 bits beside the head, which never is quantised.
    """
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_type": spec.codebook,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_quant_storage": str(storage_dtype).removeprefix("torch."),
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def _weight_key(prefix: str) -> str:
    path = prefix.removesuffix(".")
    return f"{path}.weight" if path else "weight"


def _read_state(key: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    found = [key + suffix for suffix in _STATE_SUFFIXES.values() if key + suffix in tensors]
    if len(found) != 1:
        wanted = " or ".join(key + suffix for suffix in _STATE_SUFFIXES.values())
        raise FormatError(f"{key}: expected exactly one of {wanted}; found {len(found)}")
    raw = tensors[found[0]]
    if raw.dtype != torch.uint8 or raw.numel() > MAX_STATE_BYTES:
        raise FormatError(f"{found[0]} is {list(raw.shape)} of {raw.dtype}; expected the bytes of a short JSON object")
    try:
        state = json.loads(bytes(raw.view(-1).tolist()))
        if not isinstance(state, dict):
            raise TypeError(f"it is a {type(state).__name__}")
        missing = [name for name in ("quant_type", "blocksize", "dtype", "shape") if name not in state]
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{found[0]} does not hold a JSON object: {error}") from error
    if missing:
        raise FormatError(f"{found[0]} lacks {', '.join(missing)}")
    if not found[0].endswith(f"__{state['quant_type']}"):
        raise FormatError(f"{found[0]} says quant_type {state['quant_type']!r}")
    if type(state["blocksize"]) is not int or state["blocksize"] not in BLOCK_SIZES:
        raise FormatError(f"{found[0]} says blocksize {state['blocksize']}; known: {', '.join(map(str, BLOCK_SIZES))}")
    if str(state["dtype"]) not in _DTYPES:
        raise FormatError(f"{found[0]} says dtype {state['dtype']!r}; known: {', '.join(_DTYPES)}")
    if not isinstance(state["shape"], list) or not all(type(size) is int and size > 0 for size in state["shape"]):
        raise FormatError(f"{found[0]} says shape {state['shape']!r}, which is no list of sizes")
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise FormatError(f"{found[0]} says nested_offset {offset!r}, which is no finite number")
    return state


def _lookup(key: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if key not in tensors:
        raise FormatError(f"{key} is missing: the checkpoint is incomplete")
    return tensors[key]


def _check_length(key: str, tensor: torch.Tensor, expected: int) -> None:
    if tensor.numel() != expected:
        raise FormatError(f"{key} has {tensor.numel()} elements; its shape and block size need {expected}")


def _check_map(key: str, tensors: Mapping[str, torch.Tensor], expected: torch.Tensor) -> None:
    actual = _lookup(key, tensors).float().cpu().view(-1)
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=0, atol=1e-6):
        raise FormatError(f"{key} is not the map that bitsandbytes uses for this format")
