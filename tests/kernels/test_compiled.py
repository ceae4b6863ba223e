"""The kernels of training compile for an H100, with and without everything that they can do."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels import adapter_inner, adapter_stack, counter_dropout, rms_norm, rotary, swiglu
from halfbyte.ops.counter_dropout import CounterDropout
from tests.kernels.compiled import compile_launches

DROPOUT = CounterDropout(3, 0.1, torch.zeros(1, dtype=torch.int32))
DROPOUTS = pytest.mark.parametrize("dropout", [None, CounterDropout(3, 0.1), DROPOUT], ids=["none", "seed", "base"])
WIDTHS = pytest.mark.parametrize("width", [576, 4096, 20000])
TOKENS = 64


def wide(width: int, *, tokens: int = TOKENS, spare: int = 16) -> torch.Tensor:
    """Return a matrix with room beside it."""
    return torch.zeros(tokens, width + spare, dtype=torch.bfloat16)[:, :width]


@DROPOUTS
@WIDTHS
def test_norms_compile(width: int, dropout: CounterDropout | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_launches(monkeypatch, "rms_norm")
    x, r = torch.zeros(TOKENS, width, dtype=torch.bfloat16), torch.zeros(TOKENS)
    rms_norm.rms_norm(x, x[0], 1e-5, r, wide(width), addend_=None if dropout else x, dropout=dropout)
    rms_norm.rms_norm_backward(wide(width), x, x[0], r, x, residual=x, grad_adapter=x, dropout=dropout)
    assert len(compiled) == 2


@DROPOUTS
def test_products_of_gates_and_dropout_compile(dropout: CounterDropout | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_launches(monkeypatch, "swiglu", "counter_dropout")
    gate_up = torch.zeros(TOKENS, 2 * 11008, dtype=torch.bfloat16)
    swiglu.swiglu(gate_up, wide(11008))
    swiglu.swiglu_backward(gate_up, wide(11008), wide(11008), wide(11008), dropout)
    if dropout is not None:
        counter_dropout.drop_copy(wide(11008), wide(11008), dropout)
    assert len(compiled) == 2 + (dropout is not None)


@pytest.mark.parametrize("turns", [True, False])
def test_rotation_compiles(turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_launches(monkeypatch, "rotary")
    angle = torch.zeros(TOKENS, 128, dtype=torch.bfloat16) if turns else None
    heads = torch.zeros(2, 32, TOKENS // 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    out = torch.zeros(TOKENS, 96, 128, dtype=torch.bfloat16)[:, :32]
    rotary.rotate(heads, angle, angle, out, backward=True)
    assert len(compiled) == 1


@DROPOUTS
@pytest.mark.parametrize(("width", "ranks"), [(576, 16), (4096, 48), (11008, 256)])
def test_inner_products_of_adapters_compile(
    width: int, ranks: int, dropout: CounterDropout | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = compile_launches(monkeypatch, "adapter_inner")
    A, u = torch.zeros(ranks, width, dtype=torch.bfloat16), torch.zeros(TOKENS, ranks, dtype=torch.bfloat16)
    adapter_inner.adapter_inner(
        wide(width), A, 2.0, u, wide(ranks), dropout=dropout, launch=adapter_inner.AdapterInnerLaunch()
    )
    assert len(compiled) == 1


@pytest.mark.parametrize("members", [1, 2, 3])
def test_stacking_of_adapters_compiles(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_launches(monkeypatch, "adapter_stack")
    places = [
        adapter_stack.StackMember(torch.zeros(16, 576), torch.zeros(96, 16), 96 * number, 16 * number, 1.0)
        for number in range(members)
    ]
    columns = wide(16 * members, tokens=96 * members, spare=576)
    for A in (None, torch.zeros(16 * members, 576, dtype=torch.bfloat16)):
        adapter_stack.stack_adapters(places, A, columns)
    assert len(compiled) == 2
