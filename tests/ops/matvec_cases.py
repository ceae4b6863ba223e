"""Inputs of matvec_4bit and its result in fp64, on a CPU or a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from halfbyte.kernels.matvec_4bit import MatvecLaunch
from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.matvec_4bit import OuterAdapters, matvec_4bit_group, matvec_4bit_group_triton
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec
from tests.oracles import UNIT_ROUNDOFF, assert_close

# What a looked up value may be off by, relatively, with tensor cores; others are exact.
LOOKUP_ERROR = 2.0**-16


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


def lookup_roundings(dtype: torch.dtype, *, is_exact: bool) -> float:
    """Return the roundings of a result: where products cancel, a code's error weighs up to twice as much."""
    return 1 if is_exact else 1 + 2 * LOOKUP_ERROR / UNIT_ROUNDOFF[dtype]


def check_matvec_group(
    tokens: int,
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    in_features: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    launch: MatvecLaunch | None = None,
    roundings: float = 1,
    **options: Any,
) -> None:
    """Compare a group's products with fp64, with biases and, for one weight, what is added; rank 0 is no adapter."""
    cases = [make_matvec_case(tokens, (width, in_features), QuantSpec(), dtype, device=device) for width in widths]
    x, weights = cases[0].x, [case.q for case in cases]
    Bs = [
        torch.randn(width, rank, device=device).to(dtype) if rank else None
        for width, rank in zip(widths, ranks, strict=True)
    ]
    u_TR = torch.randn(tokens, sum(ranks), device=device)
    adapters = OuterAdapters.stack(Bs, widths, dtype=dtype, device=torch.device(device)) if any(ranks) else None
    bias_F = torch.cat([case.bias for case in cases if case.bias is not None])
    terms: dict[str, Any] = {"adapters": adapters, "u_TR": u_TR, "add": cases[0].add if len(cases) == 1 else None}
    if launch is None:
        products = matvec_4bit_group(x, weights, bias_F, **terms, **options)
    else:
        products = matvec_4bit_group_triton(x, weights, bias_F, **terms, launch=launch)
    rank = 0
    for case, B, product in zip(cases, Bs, products, strict=True):
        own = dataclasses.replace(case, x=x, add=terms["add"])
        exact = own.exact()
        if B is not None:
            exact = exact + u_TR[:, rank : rank + B.shape[1]].double() @ B.double().T
            rank += B.shape[1]
        assert product.dtype == dtype
        assert product.is_contiguous()
        assert_close(
            "product", exact, product, dtype=dtype, roundings=roundings, reduction_length=in_features + sum(ranks)
        )
