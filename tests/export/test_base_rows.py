from __future__ import annotations

import pytest
import torch

from halfbyte.export.base_rows import BLOCK_ELEMENTS, iter_base_rows
from halfbyte.ops import dequantize_4bit, quantize_4bit
from halfbyte.quant import QuantSpec

SHAPES = [(700, 576), (3, 5), (1000, 1001), (64, 8192), (2, 2 * BLOCK_ELEMENTS), (257, 4096)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(double_quant=False), QuantSpec(block_size=4096)])
def test_iter_base_rows_equals_the_whole(shape: tuple[int, int], spec: QuantSpec) -> None:
    q = quantize_4bit(torch.randn(shape), spec)
    whole = dequantize_4bit(q, dtype=torch.float32)
    position = 0
    for rows, values in iter_base_rows(q):
        assert rows.start == position
        assert torch.equal(values, whole[rows])
        position = rows.stop
    assert position == shape[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_iter_base_rows_takes_a_plain_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(torch.bfloat16)
    parts = [values for _, values in iter_base_rows(weight)]
    assert torch.equal(torch.cat(parts), weight.float())
