"""Root-mean-square norm with a frozen weight, forward and backward as two calls.

    r = rsqrt(mean(x^2) + eps)        y = x r w

    grad_x = r (w grad_y - x r^2 mean(x w grad_y))

The arithmetic is fp32 whatever the dtype of x, with one rounding at the end. y is never kept: the backward of a
block computes it again from x and r. It may be written into a buffer with wider rows, which leaves room for an
adapter's columns beside it; with dropout it is an adapter's input. Where x is a sum, as behind a residual connection,
the sum is made on the way.

In the backward an adapter's share of grad_y, which saw the dropout, may come apart from the base's:

    grad_y = grad_base + dropout(grad_adapter)

On a CPU the backward goes through a matrix in chunks of rows that stay in the cores' caches.

Source: Zhang and Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import rms_norm as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.counter_dropout import CounterDropout, assert_kernel_takes, keep_mask_reference
from halfbyte.ops.row_chunks import chunk_rows, is_chunked_on_cpu, row_chunks

# T tokens (or tokens times heads), D features


def rms_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    *,
    eps: float,
    out: torch.Tensor,
    addend_: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Write the normalised `x` to `out`.

    Args:
        x: (tokens, features) or (tokens, heads, features), fp32, fp16 or bf16; features adjacent, other strides free.
        weight_D: (features,).
        eps: Added to the mean square.
        out: Of the shape and dtype of x, strides free but for the features'; may be x itself.
        addend_: If given, x is added to it in place, and it is the rounded sum that is normalised.
        dropout: Sets elements of `out` to zero.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        r, fp32, of the shape of x without the features.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("rms_norm", backend, x.device) == "torch":
        return rms_norm_reference(x, weight_D, eps=eps, out=out, addend_=addend_, dropout=dropout)
    assert_kernel_takes(x, out, addend_)
    r = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    kernels.rms_norm(x, weight_D, eps, r, out, addend_=addend_, dropout=dropout)
    return r


def rms_norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_D: torch.Tensor,
    r: torch.Tensor,
    *,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    grad_adapter: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Write the gradient of x to `out`, and return it.

    Args:
        grad_y: Of the shape of x.
        x: What was normalised.
        weight_D: (features,).
        r: What the forward returned.
        out: Of the shape of x; may be `grad_y` or `residual`.
        residual: Added: the gradient that reached x past the norm.
        grad_adapter: Added to grad_y, with the elements of `dropout`, if any, set to zero.
        dropout: Belongs to `grad_adapter`.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    terms = {"residual": residual, "grad_adapter": grad_adapter}
    if resolve_backend("rms_norm_backward", backend, x.device) == "torch":
        if x.ndim == 2 and is_chunked_on_cpu(x) and grad_adapter is None:
            return _rms_norm_backward_cpu(grad_y, x, weight_D, r, out, residual)
        return rms_norm_backward_reference(grad_y, x, weight_D, r, out=out, dropout=dropout, **terms)
    assert_kernel_takes(x, grad_y, out, *terms.values())
    assert r.is_contiguous()
    kernels.rms_norm_backward(grad_y, x, weight_D, r, out, dropout=dropout, **terms)
    return out


def rms_norm_reference(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    *,
    eps: float,
    out: torch.Tensor,
    addend_: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
) -> torch.Tensor:
    """Write the normalised `x` to `out`: the definition, in plain torch on any device."""
    if addend_ is not None:
        x = addend_.add_(x)
    wide = x.float() if x.dtype != torch.float64 else x
    r = torch.rsqrt(wide.square().mean(-1) + eps)
    out.copy_(wide * r[..., None] * weight_D.to(wide.dtype))
    if dropout is not None:
        out.mul_(keep_mask_reference(x.shape, dropout, device=x.device))
    return r


def rms_norm_backward_reference(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight_D: torch.Tensor,
    r: torch.Tensor,
    *,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    grad_adapter: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
) -> torch.Tensor:
    """Write the gradient of x to `out`: the definition, in plain torch on any device."""
    grad, wide = grad_y.to(r.dtype), x.to(r.dtype)
    if grad_adapter is not None:
        keep = 1 if dropout is None else keep_mask_reference(x.shape, dropout, device=x.device)
        grad = grad + grad_adapter * keep
    weighted = grad * weight_D.to(r.dtype)
    mean = (wide * weighted).mean(-1, keepdim=True)
    grad_x = r[..., None] * (weighted - wide * r[..., None].square() * mean)
    return out.copy_(grad_x if residual is None else grad_x + residual)


def _rms_norm_backward_cpu(
    grad_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    r_T: torch.Tensor,
    out_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
) -> torch.Tensor:
    weight_D = weight_D.float()
    residuals = (None,) * x_TD.shape[0] if residual_TD is None else residual_TD.split(chunk_rows(x_TD))
    for (grad, x, out, r), residual in zip(row_chunks(grad_TD, x_TD, out_TD, r_T), residuals, strict=False):
        # Widened first: arithmetic on two dtypes takes twice as long.
        wide, weighted, r1 = x.float(), grad.float() * weight_D, r[:, None]
        share = torch.linalg.vecdot(wide, weighted, dim=1)[:, None].mul_(r1.pow(3)).div_(x.shape[1])
        weighted.mul_(r1).addcmul_(wide, share, value=-1)
        out.copy_(weighted if residual is None else weighted.add_(residual.float()))
    return out_TD
