"""Weight and adapter rounded to 4 bits together, against autograd of the straight-through formula."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops import dequantize_4bit, quantize_4bit
from halfbyte.ops.lora_rounded import Rounding, lora_rounded, lora_rounded_reference
from halfbyte.ops.workspace import Workspace
from halfbyte.quant import QuantSpec
from tests.oracles import assert_close

TOKENS, WIDTH, OUT, RANK = 63, 128, 96, 5
SPECS = {"nf4": QuantSpec(), "fp4": QuantSpec(codebook="fp4", block_size=32, double_quant=False)}


def make_inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * size

    return {
        "x": draw(TOKENS, WIDTH).to(dtype).requires_grad_(),
        "weight": draw(OUT, WIDTH, size=0.1).to(dtype),
        "bias": draw(OUT).to(dtype),
        "lora_A": draw(RANK, WIDTH, size=0.1).requires_grad_(),
        "lora_B": draw(OUT, RANK, size=0.1).requires_grad_(),
    }


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_lora_rounded_matches_the_straight_through_reference(spec: str, dtype: torch.dtype, has_bias: bool) -> None:
    inputs = make_inputs(dtype)
    rounding = Rounding(scaling=2.0, spec=SPECS[spec])
    x, weight, A, B = (inputs[name] for name in ("x", "weight", "lora_A", "lora_B"))
    bias = inputs["bias"] if has_bias else None
    grad_y = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(1))
    leaves = [t.detach().float().requires_grad_() for t in (x, A, B)]
    expected = lora_rounded_reference(
        leaves[0], weight.float(), None if bias is None else bias.float(), leaves[1], leaves[2], rounding=rounding
    )
    expected.backward(grad_y)
    y = lora_rounded(x, weight, bias, A, B, rounding=rounding, workspace=Workspace())
    y.backward(grad_y.to(dtype))
    assert y.dtype == dtype
    # Weight, product, inner product and its gradient are rounded to the dtype, the gradient of the output before them.
    limit = {"dtype": dtype, "roundings": 4, "reduction_length": WIDTH}
    assert_close("output", expected, y, **limit)
    for name, leaf, tensor in zip(("x", "lora_A", "lora_B"), leaves, (x, A, B), strict=True):
        assert tensor.grad is not None
        assert_close(name, leaf.grad, tensor.grad, **limit)


def test_what_is_multiplied_is_the_merged_weight_in_4_bits() -> None:
    inputs = make_inputs(torch.float32)
    weight, A, B = (inputs[name].detach() for name in ("weight", "lora_A", "lora_B"))
    merged = weight + 2.0 * (B @ A)
    rounded = dequantize_4bit(quantize_4bit(merged, QuantSpec()), dtype=torch.float32)
    rounding = Rounding(scaling=2.0, spec=QuantSpec())
    y = lora_rounded(torch.eye(WIDTH), weight, None, A, B, rounding=rounding, workspace=Workspace())
    # s B A is summed in another order, so a weight that lies on a decision may fall on its other side.
    assert (rounded != y.T).float().mean() < 1e-3


def test_nothing_but_the_input_is_kept() -> None:
    inputs = make_inputs(torch.float32)
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lora_rounded(
            inputs["x"],
            inputs["weight"],
            None,
            inputs["lora_A"],
            inputs["lora_B"],
            rounding=Rounding(scaling=2.0, spec=QuantSpec()),
            workspace=Workspace(),
        )
    own = {inputs[name].data_ptr() for name in ("x", "weight", "lora_A", "lora_B")}
    assert {tensor.data_ptr() for tensor in kept} <= own
