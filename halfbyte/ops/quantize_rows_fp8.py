"""Bring the rows of a matrix to fp8, each with a scale of its own.

    codes = [hi, hi, lo, e4m3(x f / s)]        hi = e4m3(u c / s)        lo = e4m3(u c / s - hi)
    s = the smallest power of two with |x f| / s and |u c| / s <= 448

x are inputs of a product with frozen weights, and u what their adapters make of them, of which 8 bits are kept, as
many as bf16 has, in two numbers of 4. With what `adapter_columns_fp8` writes for B, the product's first columns add

    hi B_hi + hi B_lo + lo B_hi = u B        but for lo B_lo, 2^-8 of it

in fp32 and before anything is rounded. They come first, because tensor cores keep some 14 bits of a sum of e4m3: what
is small must not meet a sum that is large already. c shares the range of e4m3 among u and B.

f, a factor for each column, is for gradients: the scales of a weight's rows have to go into what is summed over them.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import quantize_rows_fp8 as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.e4m3 import FP8, encode, scale_of

# T tokens, D features, R ranks, E = 3 R + D

# u is divided by it, and B multiplied. A power of two.
SHARE_OF_B = 4.0


def quantize_rows_fp8(
    x_TD: torch.Tensor,
    *,
    codes_TE: torch.Tensor,
    scale_T: torch.Tensor,
    u_TR: torch.Tensor | None = None,
    factor_D: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write codes and scales of all rows.

    Args:
        x_TD: (tokens, features), any floating dtype of up to 32 bits; rows of any stride.
        codes_TE: e4m3, contiguous, written.
        scale_T: fp32, contiguous, written. A row of zeros has the smallest scale, 2^-100.
        u_TR: (tokens, ranks), of the adapters, contiguous; without it there are no columns of them.
        factor_D: A factor of each column, a power of two, bf16.
        backend: "auto", "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    assert codes_TE.dtype == FP8
    assert codes_TE.is_contiguous()
    assert x_TD.stride(1) == 1
    assert codes_TE.shape == (x_TD.shape[0], x_TD.shape[1] + (0 if u_TR is None else 3 * u_TR.shape[1]))
    if resolve_backend("quantize_rows_fp8", backend, x_TD.device) == "torch":
        quantize_rows_fp8_reference(x_TD, codes_TE=codes_TE, scale_T=scale_T, u_TR=u_TR, factor_D=factor_D)
        return
    assert u_TR is None or u_TR.is_contiguous()
    kernels.quantize_rows_fp8(x_TD, u_TR, factor_D, codes_TE, scale_T, u_factor=1 / SHARE_OF_B)


def quantize_rows_fp8_reference(
    x_TD: torch.Tensor,
    *,
    codes_TE: torch.Tensor,
    scale_T: torch.Tensor,
    u_TR: torch.Tensor | None = None,
    factor_D: torch.Tensor | None = None,
) -> None:
    """Do the same: the definition, in plain torch on any device."""
    x_TD = x_TD.float()
    if factor_D is not None:
        x_TD = x_TD * factor_D.float()
    largest_T = x_TD.abs().amax(1)
    if u_TR is not None and u_TR.shape[1]:
        u_TR = u_TR.float() / SHARE_OF_B
        largest_T = torch.maximum(largest_T, u_TR.abs().amax(1))
    scale_T.copy_(scale_of(largest_T))
    parts = [encode(x_TD / scale_T[:, None])]
    if u_TR is not None:
        high, low = split(u_TR / scale_T[:, None])
        parts = [high, high, low, *parts]
    torch.cat([part.view(torch.uint8) for part in parts], dim=1, out=codes_TE.view(torch.uint8))


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the e4m3 nearest to each number, and the e4m3 nearest to what it lacks."""
    high = encode(x)
    return high, encode(x - high.float())
