"""Our bytes against those that bitsandbytes once wrote; needs no bitsandbytes, so it always runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.ops import dequantize_4bit, quantize_4bit, quantize_4bit_reference
from halfbyte.ops.quantize_4bit import quantize_absmax_reference
from halfbyte.quant import QuantSpec
from halfbyte.quant.bnb_format import export_state_dict, load_quantized

FILE = Path(__file__).parents[1] / "golden" / "bnb4bit" / "cases.safetensors"
CASES = pytest.mark.parametrize("number", range(11))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FILE)


@CASES
def test_quantize_4bit_gives_the_golden_bytes(number: int, tensors: dict[str, torch.Tensor]) -> None:
    golden = load_quantized(str(number), tensors)
    single = QuantSpec(codebook=golden.codebook, block_size=golden.block_size, double_quant=False)
    for quantize in (quantize_4bit, quantize_4bit_reference):
        ours = quantize(tensors[f"{number}.original"], single)
        assert torch.equal(ours.packed, golden.packed)
        if golden.absmax_offset is None:
            assert torch.equal(ours.absmax, golden.absmax)
            continue
        # The last bits of a sum are those of the machine: its order hangs on vector width and threads.
        assert torch.allclose(ours.absmax.mean(), golden.absmax_offset, rtol=1e-6, atol=0)
        codes, scale = quantize_absmax_reference(ours.absmax, golden.absmax_offset)
        assert torch.equal(codes, golden.absmax)
        assert golden.absmax_scale is not None
        assert torch.equal(scale, golden.absmax_scale)


@CASES
def test_export_state_dict_writes_the_golden_bytes(number: int, tensors: dict[str, torch.Tensor]) -> None:
    golden = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{number}.weight")}
    ours = export_state_dict(str(number), load_quantized(str(number), tensors))
    assert ours.keys() == golden.keys()
    for key, tensor in golden.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


@CASES
def test_dequantize_4bit_restores_the_golden_numbers(number: int, tensors: dict[str, torch.Tensor]) -> None:
    assert torch.equal(dequantize_4bit(load_quantized(str(number), tensors)), tensors[f"{number}.restored"])
