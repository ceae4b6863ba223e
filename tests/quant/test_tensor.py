from __future__ import annotations

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.ops import quantize_4bit
from halfbyte.quant import QuantSpec
from halfbyte.quant.tensor import BLOCK_SIZES, CODEBOOKS


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantized_tensor_knows_its_spec_and_size(codebook: str, block_size: int, double_quant: bool) -> None:
    spec = QuantSpec(codebook=codebook, block_size=block_size, double_quant=double_quant)
    q = quantize_4bit(torch.randn(48, 97), spec)
    assert q.spec == spec
    assert q.shape == (48, 97)
    assert q.numel == 48 * 97
    num_blocks = -(-q.numel // block_size)
    second_level = -(-num_blocks // 256) * 4 + 4 if double_quant else 3 * num_blocks
    assert q.nbytes == q.numel // 2 + num_blocks + second_level


def test_quantized_tensor_costs_4_127_bits_a_weight() -> None:
    q = quantize_4bit(torch.randn(512, 512), QuantSpec())
    assert q.nbytes * 8 / q.numel == pytest.approx(4.127, abs=1e-3)


def test_quantized_tensor_to_moves_every_tensor() -> None:
    q = quantize_4bit(torch.randn(64, 64), QuantSpec()).to("meta")
    assert q.device.type == "meta"
    assert {tensor.device.type for tensor in q.tensors()} == {"meta"}
    assert len(q.tensors()) == 4


@pytest.mark.parametrize("options", [{"codebook": "int4"}, {"block_size": 48}])
def test_quant_spec_refuses_what_does_not_exist(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"quant.{next(iter(options))} is .*allowed: "):
        QuantSpec(**options)  # type: ignore[arg-type]
