"""Multiply a few tokens by a 4-bit weight.

    y[t] = round(W x[t] + bias + add[t])        W = codebook[code] * absmax[block]

in fp32, rounded once. On a GPU the expanded weight is never written: decoding one token reads the packed bytes and the
scales and nothing else, a quarter of what a 16-bit weight costs to read, and a ninth of expanding it before. That pays
for up to MAX_TOKENS tokens; more are better served by expanding, see `expand_weight`.

`add` is what else belongs to y, such as an adapter's part, kept apart until the one rounding. There is no gradient.
"""

from __future__ import annotations

import functools

import torch

from halfbyte.errors import BackendError
from halfbyte.kernels import matvec_4bit as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.quant.codebooks import codebook_values, dynamic_map
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features

MAX_TOKENS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def matvec_4bit(
    x: torch.Tensor,
    q: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    add: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply a few tokens by a 4-bit weight.

    Args:
        x: (T, in_features), fp32, fp16 or bf16.
        q: (out_features, in_features); with the Triton kernel as `fits` says.
        bias: (out_features,).
        add: (T, out_features), added before the result is rounded.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        (T, out_features) in the dtype of x, without a gradient.

    Raises:
        BackendError: The backend is unknown, cannot run on the weight's device, or does not fit.
    """
    if resolve_backend("matvec_4bit", backend, q.device) == "torch":
        return matvec_4bit_reference(x, q, bias, add=add)
    return matvec_4bit_triton(x, q, bias, add=add, launch=default_launch(x.dtype))


def matvec_4bit_reference(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None, *, add: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply a few tokens by a 4-bit weight: the definition, in plain torch on any device."""
    y_TF = x.detach().float() @ dequantize_4bit_reference(q, dtype=torch.float32).T
    for term in (bias, add):
        if term is not None:
            y_TF += term.detach().float()
    return y_TF.to(x.dtype)


def fits(x: torch.Tensor, q: QuantizedTensor) -> bool:
    """Say whether the kernel takes them: few tokens, whole blocks in each row, packed bytes that start aligned."""
    return (
        x.ndim == 2
        and 0 < x.shape[0] <= MAX_TOKENS
        and x.dtype in DTYPES
        and x.device == q.device
        and len(q.shape) == 2
        and x.shape[1] == q.shape[1]
        and q.shape[1] % q.block_size == 0
        and q.packed.data_ptr() % 16 == 0
    )


def default_launch(dtype: torch.dtype) -> kernels.MatvecLaunch:
    """Return how the kernel is launched for x of a dtype: tensor cores take 16 bits."""
    if dtype == torch.float32:
        return kernels.MatvecLaunch(lookup="shuffle", rows_per_program=4, num_warps=4)
    return kernels.MatvecLaunch(lookup="tensor", rows_per_program=16, num_warps=8, ask_first=True)


@torch.no_grad()
def matvec_4bit_triton(
    x: torch.Tensor,
    q: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    add: torch.Tensor | None = None,
    launch: kernels.MatvecLaunch,
) -> torch.Tensor:
    """Multiply a few tokens by a 4-bit weight with the Triton kernel, launched as told."""
    if not fits(x, q):
        raise BackendError(
            f"matvec_4bit has no kernel for x {tuple(x.shape)} in {x.dtype} on {x.device} and a weight {q.shape} in "
            f"blocks of {q.block_size} on {q.device}: it takes 1 to {MAX_TOKENS} tokens in a dtype of at most 32 bits "
            "on the weight's device, whole blocks in a row, and packed bytes aligned to 16; use linear_4bit, or pass "
            "backend='torch'"
        )
    assert bias is None or bias.shape == q.shape[:1], f"bias has shape {tuple(bias.shape)}, the weight {q.shape}"
    assert add is None or add.shape == (x.shape[0], q.shape[0]), f"add has shape {tuple(add.shape)}"
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    weight = kernels.MatvecWeight(
        packed=q.packed,
        absmax=q.absmax,
        scale=q.absmax_scale,
        offset=q.absmax_offset,
        dynamic_map=dynamic_map(True, q.device),
        codebook=codebook_values(q.codebook, q.device),
        planes=_code_planes(q.codebook, q.device),
        block_size=q.block_size,
    )
    out = torch.empty(x.shape[0], q.shape[0], dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    add = None if add is None else add.contiguous()
    kernels.matvec_4bit(x, weight, out, bias=bias, add=add, launch=launch)
    return out


@functools.cache
def _code_planes(codebook: str, device: torch.device) -> torch.Tensor:
    return kernels.code_planes(codebook_values(codebook)).to(device)
