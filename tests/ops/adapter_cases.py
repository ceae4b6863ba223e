"""What the tests of linear_4bit and lora_linear share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant import QuantizedTensor, QuantSpec

SHAPES = [(1, 64, 63), (63, 100, 96), (1000, 64, 130)]
"""Tokens, in_features, out_features; (63 * 100) is no multiple of a block."""
DTYPES = [torch.float32, torch.bfloat16]


@dataclasses.dataclass
class Case:
    """Inputs of one call, leaves that ask for a gradient."""

    x: torch.Tensor
    q: QuantizedTensor
    bias: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    grad_y: torch.Tensor
    workspace: Workspace

    def doubled(self) -> list[torch.Tensor]:
        """The tensors that get gradients, as fp64 leaves."""
        return [t.detach().double().requires_grad_() for t in (self.x, self.lora_A, self.lora_B, self.bias)]


def make_case(
    tokens: int, in_features: int, out_features: int, *, dtype: torch.dtype, rank: int = 8, device: str = "cpu"
) -> Case:
    weight = torch.randn(out_features, in_features, device=device) * in_features**-0.5
    return Case(
        x=torch.randn(tokens, in_features, dtype=dtype, device=device).requires_grad_(),
        q=quantize_4bit(weight.to(dtype), QuantSpec()),
        bias=torch.randn(out_features, dtype=dtype, device=device).requires_grad_(),
        lora_A=(torch.randn(rank, in_features, device=device) * in_features**-0.5).requires_grad_(),
        lora_B=(torch.randn(out_features, rank, device=device) * rank**-0.5).requires_grad_(),
        grad_y=torch.randn(tokens, out_features, dtype=dtype, device=device),
        workspace=Workspace(),
    )


def saved_tensors(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Return every tensor that autograd saves while `call` runs."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


def held_by_graph(y: torch.Tensor) -> list[torch.Tensor]:
    """Return every tensor that the graph of `y` holds otherwise: as an attribute of a node, or inside one."""
    held: list[torch.Tensor] = []
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        nodes.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
        held.extend(_tensors_in(list(getattr(node, "__dict__", {}).values())))
    return held


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors_in(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
