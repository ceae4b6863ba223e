"""Attention of one new token a prompt over a cache of fixed places.

    out = softmax(scale q K') V        over the prompt's keys 0 to length, the new token's own included

Prompts differ in length; each fills the places of its cache from 0 on, without padding. With a window, a token sees
the last `window` keys only. Query heads N are a multiple of key heads K, and each group of N / K shares one. Sums and
softmax are fp32, rounded once.

Lengths are read from the device, nothing comes back to the host: a CUDA graph of one step serves all of them.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import decode_attention as kernels
from halfbyte.ops.backend import resolve_backend

# B prompts, N query heads, K key heads, H head width, C capacity of the cache

TARGET_PROGRAMS = 264
"""As many as keep a large GPU busy: two for each multiprocessor of an H100."""
MAX_KEYS_PER_STEP, ELEMENTS_PER_STEP, ELEMENTS_PER_THREAD = 32, 8192, 32
STEPS_PER_SPLIT = 2


def decode_attention(
    q_BNH: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    length_B: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend.

    Args:
        q_BNH: (prompts, query heads, width), fp32, fp16 or bf16.
        key_BKCH: (prompts, key heads, capacity, width); the new token's key is at its length.
        value_BKCH: As the keys.
        length_B: int32, keys before the new token's, less than the capacity.
        scale: Factor of the scores.
        window: How many keys a token sees, its own included; None is all.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        (prompts, query heads, width), a new tensor of the dtype of q.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("decode_attention", backend, q_BNH.device) == "torch":
        return decode_attention_reference(q_BNH, key_BKCH, value_BKCH, length_B, scale=scale, window=window)
    launch = default_launch(q_BNH.shape, key_BKCH.shape)
    return decode_attention_triton(q_BNH, key_BKCH, value_BKCH, length_B, scale=scale, window=window, launch=launch)


def decode_attention_triton(
    q_BNH: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    length_B: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    launch: kernels.DecodeAttentionLaunch,
) -> torch.Tensor:
    """Attend with the Triton kernels, launched as told."""
    assert key_BKCH.is_contiguous()
    assert value_BKCH.is_contiguous()
    assert key_BKCH.shape == value_BKCH.shape
    assert q_BNH.shape[1] % key_BKCH.shape[1] == 0
    assert length_B.dtype == torch.int32
    q_BNH = q_BNH.contiguous()
    out_BNH = torch.empty_like(q_BNH)
    kernels.decode_attention(q_BNH, key_BKCH, value_BKCH, length_B, out_BNH, scale=scale, window=window, launch=launch)
    return out_BNH


def decode_attention_reference(
    q_BNH: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    length_B: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attend: the definition, in plain torch on any device."""
    dtype = torch.promote_types(q_BNH.dtype, torch.float32)
    place_C = torch.arange(key_BKCH.shape[2], device=q_BNH.device)
    seen_BC = place_C <= length_B[:, None]
    if window is not None:
        seen_BC &= place_C > length_B[:, None] - window
    grouped_BKGH = q_BNH.to(dtype).unflatten(1, (key_BKCH.shape[1], -1))
    score_BKGC = grouped_BKGH @ key_BKCH.to(dtype).transpose(2, 3) * scale
    share_BKGC = score_BKGC.masked_fill(~seen_BC[:, None, None], -torch.inf).softmax(-1)
    # What was never written may be anything.
    value_BKCH = value_BKCH.to(dtype).masked_fill(~seen_BC[:, None, :, None], 0)
    return (share_BKGC @ value_BKCH).flatten(1, 2).to(q_BNH.dtype)


def default_launch(q_shape: torch.Size, key_shape: torch.Size) -> kernels.DecodeAttentionLaunch:
    """Return how the kernels are launched: more programs a key head the longer the cache and the fewer the heads."""
    prompts, query_heads, width = q_shape
    key_heads, capacity = key_shape[1:3]
    group_block, block = (1 << (n - 1).bit_length() for n in (query_heads // key_heads, width))
    # Of the values of one key for all heads of a group.
    elements = group_block * block
    keys = max(4, min(MAX_KEYS_PER_STEP, ELEMENTS_PER_STEP // elements))
    splits = min(TARGET_PROGRAMS // (prompts * key_heads), -(-capacity // (STEPS_PER_SPLIT * keys)))
    warps = max(1, min(8, keys * elements // (32 * ELEMENTS_PER_THREAD)))
    return kernels.DecodeAttentionLaunch(num_splits=max(1, splits), keys_per_step=keys, num_warps=warps)
