"""Attention of one new token a prompt over a cache of fixed places.

    q, k -> rotate(norm(q)), rotate(norm(k))        by the angles of the prompt's length, which is the token's position
    cache[length] = k, v
    out = softmax(scale q K') V                     over the prompt's keys 0 to length, the new token's own included

Prompts differ in length; each fills the places of its cache from 0 on, without padding. With a window, a token sees
the last `window` keys only. Query heads N are a multiple of key heads K, and each group of N / K shares one. Norms of
heads are Qwen3's, most models have none; SmolLM3 has layers that do not rotate. The arithmetic is fp32; what is cached
is rounded once, and so is the result.

Lengths are read from the device, nothing comes back to the host: a CUDA graph of one step serves all of them.
"""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.kernels import decode_attention as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.rotary import rotate_reference_

# B prompts, N query heads, K key heads, H head width, A = N H, F = K H, C capacity of the cache

TARGET_PROGRAMS = 264
"""As many as keep a large GPU busy: two for each multiprocessor of an H100."""
MAX_KEYS_PER_STEP, ELEMENTS_PER_STEP, ELEMENTS_PER_THREAD = 32, 8192, 32
STEPS_PER_SPLIT = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorms:
    """RMS norms of queries and keys."""

    q_weight_H: torch.Tensor
    k_weight_H: torch.Tensor
    eps: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Angles:
    """Of every position, (capacity, width), both halves equal, any floating dtype, contiguous."""

    cos_CH: torch.Tensor
    sin_CH: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """What a layer does with its heads."""

    scale: float
    """Factor of the scores."""
    window: int | None = None
    """How many keys a token sees, its own included; None is all."""
    norms: HeadNorms | None = None
    angles: Angles | None = None
    """By which queries and keys turn, if they do."""


def decode_attention(
    q_BA: torch.Tensor,
    k_BF: torch.Tensor,
    v_BF: torch.Tensor,
    length_B: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    *,
    options: HeadOptions,
    overlap: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Put a token's keys and values into the cache, and attend.

    Args:
        q_BA: (prompts, query heads x width), fp32, fp16 or bf16; rows of any stride.
        k_BF: (prompts, key heads x width).
        v_BF: As the keys.
        length_B: int32, keys that the cache holds of each prompt, less than the capacity.
        key_BKCH: (prompts, key heads, capacity, width), contiguous, changed at `length_B`.
        value_BKCH: As the keys.
        options: Of the layer.
        overlap: Whether the kernels may start while those before them still run, if they let them. Lengths and what the
            cache holds must not have been written since the last launch that does not overlap.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        (prompts, query heads x width), a new tensor of the cache's dtype.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("decode_attention", backend, q_BA.device) == "torch":
        return decode_attention_reference(q_BA, k_BF, v_BF, length_B, key_BKCH, value_BKCH, options=options)
    launch = default_launch(q_BA.shape[1] // key_BKCH.shape[3], key_BKCH.shape)
    launch = dataclasses.replace(launch, overlap=overlap)
    return decode_attention_triton(q_BA, k_BF, v_BF, length_B, key_BKCH, value_BKCH, options=options, launch=launch)


def decode_attention_triton(
    q_BA: torch.Tensor,
    k_BF: torch.Tensor,
    v_BF: torch.Tensor,
    length_B: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    *,
    options: HeadOptions,
    launch: kernels.DecodeAttentionLaunch,
) -> torch.Tensor:
    """Attend with the Triton kernels, launched as told."""
    prompts, key_heads, _, width = key_BKCH.shape
    norms, angles = options.norms, options.angles
    assert all(t.stride(1) == 1 and t.shape[0] == prompts for t in (q_BA, k_BF, v_BF))
    assert k_BF.shape[1] == v_BF.shape[1] == key_heads * width
    assert q_BA.shape[1] % k_BF.shape[1] == 0
    assert key_BKCH.is_contiguous()
    assert value_BKCH.is_contiguous()
    assert key_BKCH.shape == value_BKCH.shape
    assert length_B.dtype == torch.int32
    if angles is not None:
        assert angles.cos_CH.shape == angles.sin_CH.shape == key_BKCH.shape[2:]
        assert angles.cos_CH.is_contiguous()
        assert angles.sin_CH.is_contiguous()
    out_BA = torch.empty(prompts, q_BA.shape[1], dtype=key_BKCH.dtype, device=q_BA.device)
    kernels.decode_attention(
        (q_BA, k_BF, v_BF),
        None if angles is None else (angles.cos_CH, angles.sin_CH),
        None if norms is None else (norms.q_weight_H, norms.k_weight_H),
        length_B,
        key_BKCH,
        value_BKCH,
        out_BA,
        eps=0.0 if norms is None else norms.eps,
        scale=options.scale,
        window=options.window,
        launch=launch,
    )
    return out_BA


def decode_attention_reference(
    q_BA: torch.Tensor,
    k_BF: torch.Tensor,
    v_BF: torch.Tensor,
    length_B: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    *,
    options: HeadOptions,
) -> torch.Tensor:
    """Attend: the definition, in plain torch on any device."""
    dtype = torch.promote_types(key_BKCH.dtype, torch.float32)
    q_BNH, k_BKH = (t.unflatten(1, (-1, key_BKCH.shape[3])).to(dtype, copy=True) for t in (q_BA, k_BF))
    place_B = length_B.long()
    if options.norms is not None:
        for t, weight_H in ((q_BNH, options.norms.q_weight_H), (k_BKH, options.norms.k_weight_H)):
            t *= (t.square().mean(-1, keepdim=True) + options.norms.eps).rsqrt() * weight_H.to(dtype)
    if options.angles is not None:
        for t in (q_BNH, k_BKH):
            rotate_reference_(t, options.angles.cos_CH[place_B], options.angles.sin_CH[place_B])
    prompt_B = torch.arange(len(place_B), device=place_B.device)
    key_BKCH[prompt_B, :, place_B] = k_BKH.to(key_BKCH.dtype)
    value_BKCH[prompt_B, :, place_B] = v_BF.view(k_BKH.shape).to(value_BKCH.dtype)
    return _attend_reference(q_BNH, key_BKCH, value_BKCH, place_B, options).flatten(1).to(key_BKCH.dtype)


def _attend_reference(
    q_BNH: torch.Tensor,
    key_BKCH: torch.Tensor,
    value_BKCH: torch.Tensor,
    place_B: torch.Tensor,
    options: HeadOptions,
) -> torch.Tensor:
    place_C = torch.arange(key_BKCH.shape[2], device=q_BNH.device)
    seen_BC = place_C <= place_B[:, None]
    if options.window is not None:
        seen_BC &= place_C > place_B[:, None] - options.window
    grouped_BKGH = q_BNH.unflatten(1, (key_BKCH.shape[1], -1))
    score_BKGC = grouped_BKGH @ key_BKCH.to(q_BNH.dtype).transpose(2, 3) * options.scale
    share_BKGC = score_BKGC.masked_fill(~seen_BC[:, None, None], -torch.inf).softmax(-1)
    # What was never written may be anything.
    value_BKCH = value_BKCH.to(q_BNH.dtype).masked_fill(~seen_BC[:, None, :, None], 0)
    return (share_BKGC @ value_BKCH).flatten(1, 2)


def default_launch(query_heads: int, cache_shape: torch.Size) -> kernels.DecodeAttentionLaunch:
    """Return how the kernels are launched: more programs a key head the longer the cache and the fewer the heads."""
    prompts, key_heads, capacity, width = cache_shape
    # Of the values of one key for all heads of a group.
    elements = (1 << (query_heads // key_heads - 1).bit_length()) * (1 << (width - 1).bit_length())
    keys = max(4, min(MAX_KEYS_PER_STEP, ELEMENTS_PER_STEP // elements))
    splits = min(TARGET_PROGRAMS // (prompts * key_heads), -(-capacity // (STEPS_PER_SPLIT * keys)))
    warps = max(1, min(8, keys * elements // (32 * ELEMENTS_PER_THREAD)))
    return kernels.DecodeAttentionLaunch(num_splits=max(1, splits), keys_per_step=keys, num_warps=warps)
