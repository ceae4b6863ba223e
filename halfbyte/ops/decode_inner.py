"""What comes between two products of a few new tokens, and the adapters' inner product of it.

    f(x)        u = s f(x) A'        f: an RMS norm, the gated product silu(gate) up, or nothing

A stacks the adapters of the projections that follow, s is their scaling, rank by rank. u is fp32, of the unrounded
f(x); f(x) itself is rounded once. Without adapters A has no rows, and u no columns.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import decode_inner as kernels
from halfbyte.ops.backend import resolve_backend

# T tokens, D features, F feed-forward width, R ranks


def normed_inner(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    A_RD: torch.Tensor,
    scale_R: torch.Tensor,
    *,
    eps: float,
    overlap: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm a few tokens.

    Args:
        x_TD: (tokens, features), fp32, fp16 or bf16; rows of any stride.
        weight_D: (features,), of the norm.
        A_RD: (ranks, features), any floating dtype, contiguous.
        scale_R: (ranks,), fp32.
        eps: Added to the mean square.
        overlap: Whether the kernel may start while those before it still run, if they let it. The weight, A and the
            scales must not have been written since the last launch that does not overlap.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        The normed tokens in the dtype of x, and u (tokens, ranks) in fp32.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("normed_inner", backend, x_TD.device) == "torch":
        exact_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        exact_TD = exact_TD * (exact_TD.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D
        return exact_TD.to(x_TD.dtype), _inner_reference(exact_TD, A_RD, scale_R)
    return _launch("norm", x_TD, weight_D, A_RD, scale_R, eps=eps, overlap=overlap)


def gated_inner(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    A_RF: torch.Tensor,
    scale_R: torch.Tensor,
    *,
    overlap: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(gate) up, and u; gate and up have rows of any stride, otherwise as `normed_inner`."""
    if resolve_backend("gated_inner", backend, gate_TF.device) == "torch":
        dtype = torch.promote_types(gate_TF.dtype, torch.float32)
        exact_TF = torch.nn.functional.silu(gate_TF.to(dtype)) * up_TF.to(dtype)
        return exact_TF.to(gate_TF.dtype), _inner_reference(exact_TF, A_RF, scale_R)
    assert gate_TF.shape == up_TF.shape
    assert up_TF.stride(1) == 1
    return _launch("gated", gate_TF, up_TF, A_RF, scale_R, overlap=overlap)


def plain_inner(
    x_TD: torch.Tensor, A_RD: torch.Tensor, scale_R: torch.Tensor, *, overlap: bool = False, backend: str = "auto"
) -> torch.Tensor:
    """Return u of the tokens as they are, as `normed_inner`."""
    if not A_RD.shape[0]:
        return x_TD.new_empty(x_TD.shape[0], 0, dtype=torch.float32)
    if resolve_backend("plain_inner", backend, x_TD.device) == "torch":
        return _inner_reference(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)), A_RD, scale_R)
    return _launch("plain", x_TD, x_TD, A_RD, scale_R, overlap=overlap)[1]


def _launch(
    kind: kernels.Kind,
    x_TD: torch.Tensor,
    other: torch.Tensor,
    A_RD: torch.Tensor,
    scale_R: torch.Tensor,
    *,
    eps: float = 0.0,
    overlap: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert x_TD.stride(1) == 1
    assert A_RD.is_contiguous()
    assert A_RD.shape == (scale_R.shape[0], x_TD.shape[1])
    out_TD = x_TD if kind == "plain" else torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    u_TR = torch.empty(x_TD.shape[0], A_RD.shape[0], dtype=torch.float32, device=x_TD.device)
    kernels.decode_inner(kind, x_TD, other, A_RD, scale_R, out_TD, u_TR, eps=eps, overlap=overlap)
    return out_TD, u_TR


def _inner_reference(exact_TD: torch.Tensor, A_RD: torch.Tensor, scale_R: torch.Tensor) -> torch.Tensor:
    return (exact_TD @ A_RD.to(exact_TD.dtype).T * scale_R).float()
