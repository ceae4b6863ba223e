"""Checks of the operations that decode one token against fp64, for any backend and device.

The reference in plain torch, the kernels under the interpreter and the kernels on a GPU go through the same ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from halfbyte.kernels.decode_attention import DecodeAttentionLaunch
from halfbyte.ops.decode_attention import Angles, HeadNorms, HeadOptions, decode_attention, decode_attention_triton
from halfbyte.ops.decode_inner import gated_inner, normed_inner, plain_inner
from tests.ops.fused_cases import Place
from tests.oracles import assert_close

EPS = 1e-5
# Prompts' lengths, query heads, key heads, head width, capacity.
ATTENTION_SHAPES = [
    ((0,), 1, 1, 16, 4),
    ((70, 0, 129), 4, 2, 64, 130),
    ((33,), 7, 1, 80, 64),
    ((31, 32), 9, 3, 128, 48),
]
WINDOWS = [None, 1, 40]


def check_decode_attention(
    shape: tuple[tuple[int, ...], int, int, int, int],
    dtype: torch.dtype,
    place: Place,
    *,
    window: int | None = None,
    normed: bool = False,
    rotates: bool = False,
    angle_dtype: torch.dtype = torch.float32,
    launch: DecodeAttentionLaunch | None = None,
    overlap: bool = False,
) -> None:
    lengths, query_heads, key_heads, width, capacity = shape
    prompts, rows = len(lengths), (torch.arange(len(lengths)), slice(None), torch.tensor(lengths))
    q, k, v = (torch.randn(prompts, n * width).to(dtype) for n in (query_heads, key_heads, key_heads))
    key, value = torch.randn(2, prompts, key_heads, capacity, width).to(dtype)
    angles = (torch.rand(capacity, width // 2) * 6).repeat(1, 2)
    angles = Angles(cos_CH=angles.cos().to(angle_dtype), sin_CH=angles.sin().to(angle_dtype)) if rotates else None
    weights = [(1 + torch.randn(width) * 0.2).to(dtype) for _ in range(2)]
    norms = HeadNorms(q_weight_H=weights[0], k_weight_H=weights[1], eps=EPS) if normed else None
    exact_q, exact_k = (turn(t, n, angles, lengths, width) for t, n in zip((q, k), weights_of(norms), strict=True))
    exact = torch.empty(prompts, query_heads, width, dtype=torch.float64)
    cached_k = exact_k.to(dtype)
    for prompt, length in enumerate(lengths):
        key[prompt, :, length], value[prompt, :, length] = cached_k[prompt], v[prompt].view(key_heads, width)
        seen = slice(0 if window is None else max(0, length + 1 - window), length + 1)
        for head in range(query_heads):
            keys, values = (t[prompt, head * key_heads // query_heads, seen].double() for t in (key, value))
            exact[prompt, head] = ((keys @ exact_q[prompt, head]) * 0.3).softmax(0) @ values
        # What is not written yet, or never.
        key[prompt, :, length:] = torch.nan
        value[prompt, :, length:] = torch.nan
    options = HeadOptions(scale=0.3, window=window, norms=moved(norms, place), angles=moved(angles, place))
    key, value = key.to(place.device), value.to(place.device)
    num_unwritten = int(key.isnan().sum() + value.isnan().sum())
    length_B = torch.tensor(lengths, dtype=torch.int32, device=place.device)
    arguments = (*(place.put(t) for t in (q, k, v)), length_B, key, value)
    if launch is None:
        out = decode_attention(*arguments, options=options, overlap=overlap, backend=place.backend)
    else:
        out = decode_attention_triton(*arguments, options=options, launch=launch)
    assert out.dtype == dtype
    # Scores in fp32 err by their own size, which the exponential makes relative; a key may be rounded the other way.
    roundings = 16 if dtype == torch.float32 else place.roundings + (0.5 if normed or rotates else 0)
    assert_close("out", exact.flatten(1), out, dtype=dtype, roundings=roundings, reduction_length=width + capacity)
    place.check("k", exact_k, key[rows])
    assert value[rows].flatten(1).equal(v.to(place.device))
    assert int(key.isnan().sum() + value.isnan().sum()) == num_unwritten - k.numel() - v.numel()


def weights_of(norms: HeadNorms | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if norms is None else (norms.q_weight_H, norms.k_weight_H)


def turn(
    t: torch.Tensor, weight: torch.Tensor | None, angles: Angles | None, lengths: tuple[int, ...], width: int
) -> torch.Tensor:
    """Return heads normed and turned, in fp64."""
    t = t.double().unflatten(1, (-1, width))
    if weight is not None:
        t = t * (t.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    if angles is not None:
        cos, sin = (table.double()[list(lengths)][:, None] for table in (angles.cos_CH, angles.sin_CH))
        low, high = t.chunk(2, dim=-1)
        t = t * cos + torch.cat([-high, low], dim=-1) * sin
    return t


def moved(options: Any, place: Place) -> Any:
    """Return norms or angles with their tensors where a case runs."""
    if options is None:
        return None
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    there = {name: v.to(place.device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    return type(options)(**there)


def check_decode_inner(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, place: Place, *, overlap: bool = False
) -> None:
    tokens, width, ranks = shape
    x, other = torch.randn(2, tokens, width).to(dtype)
    weight = (1 + torch.randn(width) * 0.2).to(dtype)
    A = torch.randn(ranks, width).to(dtype)
    scale = torch.rand(ranks) + 0.5
    A_there, scale_there, weight_there = (t.to(place.device) for t in (A, scale, weight))
    how: Any = {"overlap": overlap, "backend": place.backend}
    exact = x.double()
    out = None
    if kind == "norm":
        exact = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        out, u = normed_inner(place.put(x), weight_there, A_there, scale_there, eps=EPS, **how)
    elif kind == "gated":
        exact = torch.nn.functional.silu(exact) * other.double()
        out, u = gated_inner(place.put(x), place.put(other), A_there, scale_there, **how)
    else:
        u = plain_inner(place.put(x), A_there, scale_there, **how)
    if out is not None:
        assert out.is_contiguous()
        place.check("out", exact, out, reduction_length=width)
    assert u.shape == (tokens, ranks)
    if ranks:
        assert_close(
            "u", exact @ A.double().T * scale.double(), u, dtype=torch.float32, roundings=12, reduction_length=width
        )
