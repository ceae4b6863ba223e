from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch
from transformers import BitsAndBytesConfig

from halfbyte.errors import FormatError
from halfbyte.ops import dequantize_4bit, quantize_4bit
from halfbyte.quant import QuantSpec
from halfbyte.quant.bnb_format import (
    config_entry,
    export_state_dict,
    is_quantized_key,
    load_quantized,
    quantized_prefixes,
)
from tests.ops.quantize_cases import DTYPES, SPECS, assert_same_bytes

SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.codebook}-{s.block_size}-{s.double_quant:d}")
STORAGE = pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
LAYER = "model.layers.0.self_attn.q_proj"


def store_theirs(weight: torch.Tensor, spec: QuantSpec, storage_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    packed, state = bnb.functional.quantize_4bit(
        weight,
        blocksize=spec.block_size,
        quant_type=spec.codebook,
        compress_statistics=spec.double_quant,
        quant_storage=storage_dtype,
    )
    companions = {f"{LAYER}.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {f"{LAYER}.weight": packed, **companions}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


@SPEC
@STORAGE
def test_export_state_dict_writes_what_bitsandbytes_writes(spec: QuantSpec, storage_dtype: torch.dtype) -> None:
    weight = torch.randn(33, 96).bfloat16()
    theirs = store_theirs(weight, spec, storage_dtype)
    ours = export_state_dict(LAYER, quantize_4bit(weight, spec), storage_dtype=storage_dtype)
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert ours[key].shape == tensor.shape
        if spec.codebook == "nf4" or key != f"{LAYER}.weight":
            assert bytes_of(ours[key]) == bytes_of(tensor), key


@SPEC
@STORAGE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_load_quantized_reads_what_bitsandbytes_writes(
    spec: QuantSpec, storage_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.randn(32, 64).to(dtype)
    theirs = store_theirs(weight, spec, storage_dtype)
    q = load_quantized(LAYER, theirs)
    assert q.spec == spec
    assert q.dtype == dtype
    assert torch.equal(dequantize_4bit(q), dequantize_4bit(quantize_4bit(weight, spec)))
    assert_same_bytes(q, load_quantized(f"{LAYER}.", export_state_dict(LAYER, q, storage_dtype=storage_dtype)))


@SPEC
@STORAGE
def test_bitsandbytes_reads_what_export_state_dict_writes(spec: QuantSpec, storage_dtype: torch.dtype) -> None:
    q = quantize_4bit(torch.randn(40, 128).bfloat16(), spec)
    tensors = export_state_dict("", q, storage_dtype=storage_dtype)
    packed = tensors.pop("weight")
    state = bnb.functional.QuantState.from_dict({k.removeprefix("weight."): t for k, t in tensors.items()}, "cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), dequantize_4bit(q))

    tensors = export_state_dict("", q, storage_dtype=storage_dtype)
    layer = bnb.nn.Linear4bit(128, 40, bias=False, quant_storage=storage_dtype)
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        data=tensors.pop("weight"), quantized_stats=tensors, requires_grad=False, device="cpu", module=layer
    )
    restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(restored, dequantize_4bit(q))
    saved = layer.state_dict()
    for key, tensor in export_state_dict("", q, storage_dtype=storage_dtype).items():
        assert bytes_of(saved[key]) == bytes_of(tensor), key


def test_export_state_dict_takes_odd_shapes() -> None:
    q = quantize_4bit(torch.randn(3, 7), QuantSpec())
    assert_same_bytes(q, load_quantized("a", export_state_dict("a", q)))
    with pytest.raises(FormatError, match=r"a\.weight: 11 bytes cannot be stored as torch.bfloat16"):
        export_state_dict("a", q, storage_dtype=torch.bfloat16)


def test_is_quantized_key_tells_companions_from_weights() -> None:
    tensors = export_state_dict(LAYER, quantize_4bit(torch.randn(8, 64), QuantSpec()))
    assert [is_quantized_key(key) for key in tensors] == [False, True, True, True, True, True]
    assert not is_quantized_key(f"{LAYER}.bias")
    assert not is_quantized_key("absmax")


def test_quantized_prefixes_finds_the_layers() -> None:
    keys = [f"{LAYER}.bias", "lm_head.weight"]
    for prefix, codebook in ((LAYER, "nf4"), ("b", "fp4"), ("", "nf4")):
        keys += export_state_dict(prefix, quantize_4bit(torch.randn(8, 64), QuantSpec(codebook=codebook)))
    assert quantized_prefixes(keys) == [LAYER, "b", ""]


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_config_entry_is_that_of_transformers(codebook: str, double_quant: bool) -> None:
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=codebook,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    ours = config_entry(
        QuantSpec(codebook=codebook, double_quant=double_quant),
        torch.bfloat16,
        storage_dtype=torch.bfloat16,
        skip_modules=["lm_head"],
    )
    assert ours == theirs.to_dict()
    assert json.loads(json.dumps(ours)) == ours


def replace_state(tensors: dict[str, torch.Tensor], **changes: object) -> dict[str, torch.Tensor]:
    key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    return tensors | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


DAMAGES = {
    "is missing": lambda t: {k: v for k, v in t.items() if not k.endswith(".weight.absmax")},
    "expected exactly one of": lambda t: {k: v for k, v in t.items() if "quant_state" not in k},
    "weight has 255 elements; its shape and block size need 256": lambda t: (
        t | {f"{LAYER}.weight": t[f"{LAYER}.weight"][1:]}
    ),
    "absmax has 4 elements; its shape and block size need 8": lambda t: (
        t | {f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"][:4]}
    ),
    "nested_absmax has 2 elements; its shape and block size need 1": lambda t: (
        t | {f"{LAYER}.weight.nested_absmax": torch.ones(2)}
    ),
    "absmax has dtype torch.float32; expected torch.uint8": lambda t: t | {f"{LAYER}.weight.absmax": torch.ones(8)},
    "nested_quant_map is not the map": lambda t: t | {f"{LAYER}.weight.nested_quant_map": torch.linspace(-1, 1, 256)},
    "weight.quant_map is not the map": lambda t: t | {f"{LAYER}.weight.quant_map": torch.linspace(-1, 1, 16)},
    "does not hold a JSON object": lambda t: (
        t | {f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.tensor([123, 34], dtype=torch.uint8)}
    ),
    "says blocksize 100; known: 32": lambda t: replace_state(t, blocksize=100),
    "says quant_type 'fp4'": lambda t: replace_state(t, quant_type="fp4"),
    "says dtype 'int8'; known: float32": lambda t: replace_state(t, dtype="int8"),
    "says shape": lambda t: replace_state(t, shape="wide"),
    "nested_blocksize is 128": lambda t: replace_state(t, nested_blocksize=128),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_load_quantized_says_what_is_damaged(message: str) -> None:
    tensors = export_state_dict(LAYER, quantize_4bit(torch.randn(8, 64), QuantSpec()))
    with pytest.raises(FormatError, match=message) as caught:
        load_quantized(LAYER, DAMAGES[message](tensors))
    assert LAYER in str(caught.value)
