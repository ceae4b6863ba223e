"""PiSSA and LoftQ of one weight, against PEFT's own and against what they promise."""

from __future__ import annotations

import bitsandbytes
import peft
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

from halfbyte.errors import ConfigError
from halfbyte.nn.split import SplitOptions, quantize_rest, split_weight
from halfbyte.ops import dequantize_4bit, quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec
from tests.oracles import assert_close, relative_rms

PLAIN_ABSMAX = QuantSpec(double_quant=False)


def options(init: str, *, rank: int = 8, scaling: float = 2.0, rounds: int = 1) -> SplitOptions:
    return SplitOptions(init=init, rank=rank, scaling=scaling, loftq_iterations=rounds)


def decaying_weight(num_rows: int = 96, width: int = 128, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a weight whose singular values fall as those of trained ones do."""
    U, _, Vh = torch.linalg.svd(torch.randn(num_rows, width), full_matrices=False)
    return (U * torch.arange(1, len(U) + 1).float().pow(-0.7) @ Vh).to(dtype)


def in_fp32(base: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    return dequantize_4bit(base, dtype=torch.float32) if isinstance(base, QuantizedTensor) else base


def error_of(weight: torch.Tensor, base: torch.Tensor | QuantizedTensor, scaled_product: torch.Tensor) -> float:
    return relative_rms(weight.float(), in_fp32(base) + scaled_product)


@pytest.mark.parametrize("quant", [None, QuantSpec()], ids=["plain", "4bit"])
def test_pissa_takes_the_largest_singular_values(quant: QuantSpec | None) -> None:
    weight = decaying_weight()
    base, split = split_weight(weight, quant, options("pissa"))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    largest = U[:, :8] * S[:8] @ Vh[:8]
    first = split.first
    assert_close("B A", largest, 2.0 * first.B_FR @ first.A_RD, dtype=torch.float32, roundings=16, reduction_length=96)
    # Equal sizes, so that both learn alike.
    torch.testing.assert_close(first.A_RD.norm(dim=1), first.B_FR.norm(dim=0))
    assert split.taken is not None
    assert split.taken.A_RD.equal(first.A_RD)
    rest = weight - 2.0 * first.B_FR @ first.A_RD
    expected = rest if quant is None else dequantize_4bit(quantize_4bit(rest, quant), dtype=torch.float32)
    # A weight at the edge between two codes may fall to either side.
    assert relative_rms(expected, in_fp32(base)) < 1e-3


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_64"])
def test_pissa_equals_peft(init: str) -> None:
    weight = decaying_weight()
    model = nn.Sequential(nn.Linear(128, 96, bias=False))
    model[0].weight.data.copy_(weight)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=init)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    their_product = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    base, split = split_weight(weight, None, options(init))
    product = 2.0 * split.first.B_FR @ split.first.A_RD
    # Neighbouring singular values are 0.92 of each other; 64 rounds leave 0.92 ** 129, some 2e-5 of the last one.
    limit = 1e-5 if init == "pissa" else 1e-4
    assert relative_rms(their_product, product) < limit
    assert relative_rms(layer.base_layer.weight, base) < limit


def test_pissa_of_a_random_subspace_depends_on_its_seed_alone() -> None:
    weight = decaying_weight()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    _, first = split_weight(weight, QuantSpec(), options("pissa_niter_2"))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    _, second = split_weight(weight, QuantSpec(), options("pissa_niter_2"))
    assert first.first.A_RD.equal(second.first.A_RD)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_loftq_equals_peft(rounds: int) -> None:
    # PEFT's loftq_init runs on a GPU alone; this is its loop, with its decomposition and bitsandbytes' own quantiser.
    weight = decaying_weight()
    rest = weight
    for _ in range(rounds):
        packed, state = bitsandbytes.functional.quantize_4bit(rest, quant_type="nf4", compress_statistics=False)
        base = bitsandbytes.functional.dequantize_4bit(packed, state)
        parts = _low_rank_decomposition(weight - base, reduced_rank=8)
        product = parts["L"] @ parts["R"]
        rest = weight - product
    ours, split = split_weight(weight, PLAIN_ABSMAX, options("loftq", rounds=rounds))
    # Our factors are theirs over the root of the scaling, and rounded so: now and then a weight at the edge of a code
    # falls to the other side.
    others = ~torch.isclose(in_fp32(ours), base, rtol=1e-4, atol=1e-5)
    assert others.float().mean() < 1e-3
    assert relative_rms(product, 2.0 * split.first.B_FR @ split.first.A_RD) < 2e-3


def test_loftq_of_one_round_leaves_the_plain_base() -> None:
    weight = decaying_weight(dtype=torch.bfloat16)
    base, split = split_weight(weight, QuantSpec(), options("loftq"))
    plain = quantize_4bit(weight, QuantSpec())
    assert split.taken is None
    assert isinstance(base, QuantizedTensor)
    assert all(ours.equal(theirs) for ours, theirs in zip(base.tensors(), plain.tensors(), strict=True))
    assert base.dtype == torch.bfloat16


def test_splits_are_nearer_to_the_weight_than_nf4_alone() -> None:
    weight = decaying_weight()
    errors = {"nf4": error_of(weight, quantize_4bit(weight, QuantSpec()), torch.zeros(()))}
    for name, chosen in {
        "pissa": options("pissa"),
        "loftq 1": options("loftq"),
        "loftq 5": options("loftq", rounds=5),
    }.items():
        base, split = split_weight(weight, QuantSpec(), chosen)
        errors[name] = error_of(weight, base, chosen.scaling * split.first.B_FR @ split.first.A_RD)
    assert errors["loftq 5"] < errors["loftq 1"] < errors["nf4"]
    assert errors["pissa"] < errors["nf4"]


def test_a_split_keeps_the_dtype_of_its_weight_and_can_be_made_again() -> None:
    weight = decaying_weight(dtype=torch.bfloat16)
    base, split = split_weight(weight, QuantSpec(), options("pissa"))
    assert isinstance(base, QuantizedTensor)
    assert base.dtype == torch.bfloat16
    assert split.taken is not None
    again = quantize_rest(weight, split.taken, 2.0, QuantSpec())
    assert isinstance(again, QuantizedTensor)
    assert all(one.equal(other) for one, other in zip(base.tensors(), again.tensors(), strict=True))


@pytest.mark.parametrize(
    ("chosen", "quant", "message"),
    [
        (options("pissa", rank=97), QuantSpec(), "no more than 96 singular values"),
        (options("loftq"), None, "this layer is not quantised"),
    ],
)
def test_split_weight_refuses(chosen: SplitOptions, quant: QuantSpec | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_weight(decaying_weight(), quant, chosen)
