"""GGUF tensors under the names, and in the row order, that transformers' models use.

Names go through the gguf package's own map. Values differ in two ways from what transformers expects:

* **Rows of q and k** in files of the `llama` architecture are reordered for interleaved rotary pairs: head by head,
  row 2i + s of the file is row i + s * half of the model, s in {0, 1}. Qwen files keep transformers' order.
* **Gemma's norm weights** are stored plus one.

Only architectures for which a test proves equal logits with transformers' own reading are accepted.

Llama 3.1 and later stretch their rotary frequencies. The file carries the quotients as a tensor, `rope_freqs`, and no
parameters; we recognise the published parameters by computing the quotients from them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from halfbyte.errors import FormatError
from halfbyte.models.gguf_file import GgufFile, GgufTensor

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Far more than any model has; names are made for each.
MAX_LAYERS = 1024
_OUTER_MODULES = ("model.embed_tokens", "model.norm", "lm_head")
_LAYER_MODULES = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgufFamily:
    """How files of one architecture differ from transformers' model."""

    interleaved_rotary: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "llama": GgufFamily(interleaved_rotary=True),
    "qwen2": GgufFamily(),
    "qwen3": GgufFamily(),
    "gemma2": GgufFamily(norm_offset=1.0),
    "gemma3": GgufFamily(norm_offset=1.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GgufWeight:
    """One tensor of a GGUF file as transformers knows it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of what `read` gives."""
    storage_dtype: torch.dtype
    """The narrowest dtype that holds it to the precision of the file."""
    read: Callable[[], torch.Tensor]


def iter_gguf_weights(file: GgufFile) -> Iterator[GgufWeight]:
    """Yield the tensors of a file by transformers' names.

    Raises:
        FormatError: The architecture is not known to be read right, or a tensor is unknown.
    """
    family = check_architecture(file)
    names = make_tensor_names(_architecture(file), _whole_field(file, "block_count", at_most=MAX_LAYERS))
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FACTORS:
            continue
        if tensor.name not in names:
            raise FormatError(f"{file.path}: tensor {tensor.name} is unknown in the {_architecture(file)} architecture")
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.type_name)
        yield GgufWeight(
            name=names[tensor.name],
            shape=tensor.shape,
            dtype=plain or torch.float32,
            storage_dtype=plain or torch.float16,
            read=_reader(file, tensor, family),
        )


def make_rope_parameters(file: GgufFile) -> dict[str, Any] | None:
    """Return the rotary parameters behind a file's `rope_freqs`, or None where it has none.

    Raises:
        FormatError: The quotients are not those of Llama 3's way of stretching.
    """
    if ROPE_FACTORS not in file.tensors:
        return None
    factors = file.read(file.tensors[ROPE_FACTORS]).double()
    theta = _field(file, "rope.freq_base")
    if not isinstance(theta, float | int):
        raise FormatError(f"{file.path}: rope.freq_base is {theta!r}, no number")
    factors, theta = factors.view(-1), float(theta)
    factor = float(factors.max())
    parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}
    expected = make_rope_factors(parameters, factors.numel())
    if not torch.allclose(factors, expected, rtol=1e-3):
        raise FormatError(f"{file.path}: its {ROPE_FACTORS} are not Llama 3's; get the model as safetensors instead")
    return parameters


def make_rope_factors(parameters: Mapping[str, Any], num_frequencies: int) -> torch.Tensor:
    """Return what Llama 3 divides each rotary frequency by: 1 for short waves, `factor` for long ones, or a blend.

    Args:
        parameters: As transformers' configuration has them, of rope_type llama3.
        num_frequencies: Half the width of a head.
    """
    exponents = torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies
    wavelengths = 2 * math.pi * parameters["rope_theta"] ** exponents
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    smooth = (parameters["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return 1 / ((1 - smooth.clamp(0, 1)) / parameters["factor"] + smooth.clamp(0, 1))


def make_tensor_names(architecture: str, num_layers: int) -> dict[str, str]:
    """Return transformers' name for each tensor that a file of an architecture may hold."""
    import gguf

    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    name_map = gguf.get_tensor_name_map(number, num_layers)
    layer_paths = [f"model.layers.{layer}.{module}" for layer in range(num_layers) for module in _LAYER_MODULES]
    names = {}
    for path in (*_OUTER_MODULES, *layer_paths):
        gguf_path = name_map.get_name(path)
        if gguf_path is not None:
            for suffix in (".weight", ".bias"):
                names[gguf_path + suffix] = path + suffix
    return names


def interleave_halves(halves: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows of q or k as the llama architecture has them: (head, which, pair) to (head, pair, which of it)."""
    return _swap_in_heads(halves, (num_heads, 2, halves.shape[0] // num_heads // 2))


def check_architecture(file: GgufFile) -> GgufFamily:
    architecture = _architecture(file)
    if architecture not in FAMILIES:
        raise FormatError(
            f"{file.path}: GGUF files of the {architecture!r} architecture are not read; known: "
            f"{', '.join(FAMILIES)}. Get the model as safetensors instead"
        )
    return FAMILIES[architecture]


def _architecture(file: GgufFile) -> str:
    return str(file.fields.get("general.architecture"))


def _field(file: GgufFile, key: str) -> Any:
    full_key = f"{_architecture(file)}.{key}"
    if full_key not in file.fields:
        raise FormatError(f"{file.path} lacks the field {full_key}")
    return file.fields[full_key]


def _whole_field(file: GgufFile, key: str, *, at_most: int) -> int:
    value = _field(file, key)
    if type(value) is not int or not 1 <= value <= at_most:
        raise FormatError(f"{file.path}: {_architecture(file)}.{key} is {value!r}; expected 1 to {at_most}")
    return value


def _reader(file: GgufFile, tensor: GgufTensor, family: GgufFamily) -> Callable[[], torch.Tensor]:
    if family.interleaved_rotary and (".attn_q." in tensor.name or ".attn_k." in tensor.name):
        key = "attention.head_count"
        if ".attn_k." in tensor.name and file.fields.get(f"{_architecture(file)}.{key}_kv"):
            key += "_kv"
        num_heads = _whole_field(file, key, at_most=tensor.shape[0])
        if tensor.shape[0] % (2 * num_heads):
            raise FormatError(f"{file.path}: {tensor.name} has {tensor.shape[0]} rows, no pairs for {num_heads} heads")
        return lambda: _restore_halves(file.read(tensor), num_heads)
    if family.norm_offset and tensor.name.endswith("norm.weight"):
        return lambda: file.read(tensor) - family.norm_offset
    return lambda: file.read(tensor)


def _restore_halves(interleaved: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the reordering of rows: (head, pair, which of the pair) to (head, which, pair)."""
    return _swap_in_heads(interleaved, (num_heads, interleaved.shape[0] // num_heads // 2, 2))


def _swap_in_heads(rows: torch.Tensor, order: tuple[int, int, int]) -> torch.Tensor:
    return rows.reshape(*order, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
