"""Slabs: everything of every weight comes back, bit for bit, from any memory of the same layout."""

from __future__ import annotations

import pytest
import torch

from halfbyte.memory.weight_slab import ALIGNMENT_BYTES, PART_NAMES, WeightSlab, slab_bytes
from halfbyte.ops import quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec

SHAPES = {"self_attn.q_proj": (33, 64), "mlp.up_proj": (7, 5), "mlp.down_proj": (128, 96)}


def make_weights(spec: QuantSpec) -> dict[str, QuantizedTensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: quantize_4bit(torch.randn(shape, generator=generator), spec) for name, shape in SHAPES.items()}


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert (one.shape, one.dtype, one.spec) == (other.shape, other.dtype, other.spec)
    for name in PART_NAMES:
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert torch.equal(left, right)


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_come_back_from_the_slab_and_from_a_copy_of_it(double_quant: bool) -> None:
    weights = make_weights(QuantSpec(double_quant=double_quant, block_size=32))
    slab = WeightSlab(weights, torch.empty(slab_bytes(weights) + 100, dtype=torch.uint8))
    elsewhere = torch.zeros(slab.nbytes + 7, dtype=torch.uint8)
    elsewhere[: slab.nbytes] = slab.memory
    for name, weight in weights.items():
        assert_same(slab.weights[name], weight)
        assert_same(slab.over(elsewhere)[name], weight)


def test_parts_are_aligned_and_nothing_is_wasted_between_them() -> None:
    weights = make_weights(QuantSpec())
    slab = WeightSlab(weights, torch.empty(slab_bytes(weights), dtype=torch.uint8))
    start = slab.memory.data_ptr()
    places = [t.data_ptr() - start for weight in slab.weights.values() for t in weight.tensors()]
    assert places == sorted(places)
    assert all(place % ALIGNMENT_BYTES == 0 for place in places)
    num_parts = sum(len(weight.tensors()) for weight in weights.values())
    assert slab.nbytes <= sum(weight.nbytes for weight in weights.values()) + num_parts * ALIGNMENT_BYTES


def test_a_slab_does_not_keep_the_memory_that_its_weights_came_from() -> None:
    weights = make_weights(QuantSpec())
    slab = WeightSlab(weights, torch.empty(slab_bytes(weights), dtype=torch.uint8))
    mine = slab.memory.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for w in slab.weights.values() for t in w.tensors()} == {mine}
