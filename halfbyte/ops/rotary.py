"""Rotary position embedding, in place or from one layout into another.

    y[:, :H/2] = x[:, :H/2] cos - x[:, H/2:] sin        y[:, H/2:] = x[:, H/2:] cos + x[:, :H/2] sin

Both halves of a head turn together, as in the checkpoints that transformers reads. Turning back is turning by -sin,
which is the gradient too. The arithmetic is fp32 with one rounding.

Source: Su et al., RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import rotary as kernels
from halfbyte.ops.backend import resolve_backend

# B rows, L tokens a row, T = B L tokens, N heads, H head width


def rotate_(
    x_TNH: torch.Tensor,
    cos_TH: torch.Tensor,
    sin_TH: torch.Tensor,
    *,
    backward: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Turn every head of `x_TNH` by the angles of its token, in place, and return it.

    Args:
        x_TNH: (tokens, heads, width), fp32, fp16 or bf16; a head's elements adjacent, other strides free, so that the
            queries and keys inside a wider buffer turn in one call.
        cos_TH: (tokens, width), both halves equal, any floating dtype, contiguous.
        sin_TH: As the cosines.
        backward: Turn back instead.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("rotate_", backend, x_TNH.device) == "torch":
        return rotate_reference_(x_TNH, cos_TH, sin_TH, backward=backward)
    return _rotate_triton(x_TNH[None], cos_TH, sin_TH, out_TNH=x_TNH, backward=backward)


def rotate(
    x_BLNH: torch.Tensor,
    cos_TH: torch.Tensor,
    sin_TH: torch.Tensor,
    *,
    out_TNH: torch.Tensor,
    backward: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Write every head of `x_BLNH`, turned by the angles of its token, to `out_TNH`, and return that.

    Args:
        x_BLNH: (rows, tokens, heads, width), fp32, fp16 or bf16; a head's elements adjacent, other strides free.
        cos_TH: (rows x tokens, width), both halves equal, any floating dtype, contiguous.
        sin_TH: As the cosines.
        out_TNH: (rows x tokens, heads, width); a head's elements adjacent, other strides free.
        backward: Turn back instead.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("rotate", backend, x_BLNH.device) == "torch":
        out_TNH.unflatten(0, x_BLNH.shape[:2]).copy_(x_BLNH)
        return rotate_reference_(out_TNH, cos_TH, sin_TH, backward=backward)
    return _rotate_triton(x_BLNH, cos_TH, sin_TH, out_TNH=out_TNH, backward=backward)


def move_heads(x_BLNH: torch.Tensor, *, out_TNH: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Write every head of `x_BLNH` to `out_TNH` as it is, and return that; arguments as those of `rotate`.

    The width is even. Torch's own copy between such layouts takes twice the time on a GPU.
    """
    if resolve_backend("move_heads", backend, x_BLNH.device) == "torch":
        out_TNH.unflatten(0, x_BLNH.shape[:2]).copy_(x_BLNH)
        return out_TNH
    return _rotate_triton(x_BLNH, None, None, out_TNH=out_TNH, backward=False)


def _rotate_triton(
    x_BLNH: torch.Tensor,
    cos_TH: torch.Tensor | None,
    sin_TH: torch.Tensor | None,
    *,
    out_TNH: torch.Tensor,
    backward: bool,
) -> torch.Tensor:
    assert x_BLNH.stride(3) == out_TNH.stride(2) == 1
    assert x_BLNH.itemsize <= 4
    assert x_BLNH.shape[0] * x_BLNH.shape[1] == out_TNH.shape[0]
    for angle in (cos_TH, sin_TH):
        assert angle is None or (angle.shape == (out_TNH.shape[0], out_TNH.shape[2]) and angle.is_contiguous())
    kernels.rotate(x_BLNH, cos_TH, sin_TH, out_TNH, backward=backward)
    return out_TNH


def rotate_reference_(
    x_TNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor, *, backward: bool = False
) -> torch.Tensor:
    """Turn every head in place: the definition, in plain torch on any device."""
    dtype = torch.promote_types(x_TNH.dtype, torch.float32)
    half = x_TNH.shape[-1] // 2
    cos, sin = (t[:, None, :half].to(dtype) for t in (cos_TH, sin_TH))
    sin = -sin if backward else sin
    low, high = x_TNH.to(dtype).split(half, dim=-1)
    return x_TNH.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1))
