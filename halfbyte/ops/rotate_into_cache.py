"""Queries, keys and values of one new token a prompt: normed, turned, and put where attention reads them.

    q, k -> rotate(norm(q)), rotate(norm(k))        by the angles of the prompt's length, which is the token's position
    cache[length] = k, v

Norms of heads are Qwen3's, most models have none; SmolLM3 has layers that do not rotate. The arithmetic is fp32 with
one rounding. Lengths are read from the device, see `decode_attention`.
"""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.kernels import rotate_into_cache as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.rotary import rotate_reference_

# B prompts, N query heads, K key heads, H head width, C capacity of the cache


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorms:
    """RMS norms of queries and keys."""

    q_weight_H: torch.Tensor
    k_weight_H: torch.Tensor
    eps: float


def rotate_into_cache(
    q_BA: torch.Tensor,
    k_BF: torch.Tensor,
    v_BF: torch.Tensor,
    *,
    cos_CH: torch.Tensor,
    sin_CH: torch.Tensor,
    length_B: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    norms: HeadNorms | None = None,
    rotates: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Put a token's keys and values into the cache, and return its queries.

    Args:
        q_BA: (prompts, query heads x width), fp32, fp16 or bf16; rows of any stride.
        k_BF: (prompts, key heads x width).
        v_BF: As the keys.
        cos_CH: (capacity, width), cosines of every position, both halves equal, any floating dtype, contiguous.
        sin_CH: Sines.
        length_B: int32, keys that the cache holds of each prompt, less than the capacity.
        key_BKCH: (prompts, key heads, capacity, width), changed at `length_B`.
        value_BKCH: As the keys.
        norms: Of queries and keys, if they are normed.
        rotates: Whether queries and keys turn.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        (prompts, query heads, width), a new tensor of the cache's dtype.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    prompts, width = q_BA.shape[0], key_BKCH.shape[3]
    if resolve_backend("rotate_into_cache", backend, q_BA.device) == "torch":
        heads = tuple(t.unflatten(1, (-1, width)) for t in (q_BA, k_BF, v_BF))
        return _rotate_into_cache_reference(
            heads, cos_CH, sin_CH, length_B, key_BKCH, value_BKCH, norms=norms, rotates=rotates
        )
    assert all(t.stride(1) == 1 for t in (q_BA, k_BF, v_BF))
    assert all(t.is_contiguous() for t in (cos_CH, sin_CH, key_BKCH, value_BKCH))
    assert cos_CH.shape == sin_CH.shape == key_BKCH.shape[2:]
    assert length_B.dtype == torch.int32
    out_BNH = torch.empty(prompts, q_BA.shape[1] // width, width, dtype=key_BKCH.dtype, device=q_BA.device)
    kernels.rotate_into_cache(
        (q_BA, k_BF, v_BF),
        (cos_CH, sin_CH),
        None if norms is None else (norms.q_weight_H, norms.k_weight_H),
        length_B,
        key_BKCH,
        value_BKCH,
        out_BNH,
        eps=0.0 if norms is None else norms.eps,
        rotates=rotates,
    )
    return out_BNH


def _rotate_into_cache_reference(
    heads: tuple[torch.Tensor, ...],
    cos_CH: torch.Tensor,
    sin_CH: torch.Tensor,
    length_B: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    *,
    norms: HeadNorms | None,
    rotates: bool,
) -> torch.Tensor:
    dtype = torch.promote_types(key_BKCH.dtype, torch.float32)
    q, k, v = (t.to(dtype, copy=True) for t in heads)
    if norms is not None:
        for t, weight_H in ((q, norms.q_weight_H), (k, norms.k_weight_H)):
            t *= (t.square().mean(-1, keepdim=True) + norms.eps).rsqrt() * weight_H.to(dtype)
    if rotates:
        place = length_B.long()
        for t in (q, k):
            rotate_reference_(t, cos_CH[place], sin_CH[place])
    prompt, place = torch.arange(len(length_B), device=length_B.device), length_B.long()
    key_BKCH[prompt, :, place] = k.to(key_BKCH.dtype)
    value_BKCH[prompt, :, place] = v.to(value_BKCH.dtype)
    return q.to(key_BKCH.dtype)
