"""Inputs of matvec_4bit and its result in fp64, on a CPU or a GPU."""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec


@dataclasses.dataclass(frozen=True)
class MatvecCase:
    """Inputs of one call."""

    x: torch.Tensor
    q: QuantizedTensor
    bias: torch.Tensor | None
    add: torch.Tensor | None

    def exact(self) -> torch.Tensor:
        """The product in fp64 with the weight as fp32 restores it."""
        y = self.x.double() @ dequantize_4bit_reference(self.q, dtype=torch.float32).double().T
        y = y if self.bias is None else y + self.bias.double()
        return y if self.add is None else y + self.add.double()


def make_matvec_case(
    tokens: int,
    shape: tuple[int, int],
    spec: QuantSpec,
    dtype: torch.dtype,
    *,
    with_terms: bool = True,
    device: str = "cpu",
) -> MatvecCase:
    """Return random inputs; no two blocks of the weight have about the same scale, nor two tokens.

    `with_terms` adds a bias in `dtype` and an fp32 tensor.
    """
    generator = torch.Generator(device).manual_seed(tokens + sum(shape))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    out_features, in_features = shape
    blocks = normal(out_features * in_features // spec.block_size, 1).exp()
    weight = (normal(blocks.numel(), spec.block_size) * blocks).view(shape)
    x = normal(tokens, in_features) * torch.arange(1, tokens + 1, device=device)[:, None]
    bias = normal(out_features).to(dtype) if with_terms else None
    add = normal(tokens, out_features) if with_terms else None
    return MatvecCase(x=x.to(dtype), q=quantize_4bit(weight, spec), bias=bias, add=add)
