"""Checks of the operations that decode one token against fp64, for any backend and device.

The reference in plain torch, the kernels under the interpreter and the kernels on a GPU go through the same ones.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.decode_attention import DecodeAttentionLaunch
from halfbyte.ops.decode_attention import decode_attention, decode_attention_triton
from halfbyte.ops.decode_inner import gated_inner, normed_inner, plain_inner
from halfbyte.ops.decode_outer import OuterAdapters, decode_outer
from halfbyte.ops.rotate_into_cache import HeadNorms, rotate_into_cache
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
    window: int | None,
    launch: DecodeAttentionLaunch | None = None,
) -> None:
    lengths, query_heads, key_heads, width, capacity = shape
    prompts = len(lengths)
    q = torch.randn(prompts, query_heads, width).to(dtype)
    key, value = torch.randn(2, prompts, key_heads, capacity, width).to(dtype)
    exact = torch.empty(prompts, query_heads, width, dtype=torch.float64)
    for prompt, length in enumerate(lengths):
        seen = slice(0 if window is None else max(0, length + 1 - window), length + 1)
        for head in range(query_heads):
            keys, values = (t[prompt, head * key_heads // query_heads, seen].double() for t in (key, value))
            exact[prompt, head] = ((keys @ q[prompt, head].double()) * 0.3).softmax(0) @ values
        # What no token may see.
        key[prompt, :, length + 1 :] = torch.nan
        value[prompt, :, length + 1 :] = torch.nan
    length_B = torch.tensor(lengths, dtype=torch.int32, device=place.device)
    arguments = (*(t.to(place.device) for t in (q, key, value)), length_B)
    if launch is None:
        out = decode_attention(*arguments, scale=0.3, window=window, backend=place.backend)
    else:
        out = decode_attention_triton(*arguments, scale=0.3, window=window, launch=launch)
    assert out.dtype == dtype
    # Scores in fp32 err by their own size, which the exponential makes relative.
    roundings = 12 if dtype == torch.float32 else place.roundings
    assert_close("out", exact, out, dtype=dtype, roundings=roundings, reduction_length=width + capacity)


def check_rotate_into_cache(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    place: Place,
    *,
    normed: bool,
    rotates: bool,
    angle_dtype: torch.dtype = torch.float32,
) -> None:
    query_heads, key_heads, width = heads
    prompts, capacity = len(lengths), max(lengths) + 2
    q, k, v = (torch.randn(prompts, n * width).to(dtype) for n in (query_heads, key_heads, key_heads))
    angles = (torch.rand(capacity, width // 2) * 6).repeat(1, 2)
    cos, sin = angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)
    weights = [(1 + torch.randn(width) * 0.2).to(dtype) for _ in range(2)]
    turned = []
    for t, weight in zip((q, k), weights, strict=True):
        t = t.double().unflatten(1, (-1, width))
        if normed:
            t = t * (t.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        if rotates:
            c, s = (table.double()[list(lengths)][:, None] for table in (cos, sin))
            low, high = t.chunk(2, dim=-1)
            t = t * c + torch.cat([-high, low], dim=-1) * s
        turned.append(t)
    cache = torch.full((2, prompts, key_heads, capacity, width), torch.nan, dtype=dtype, device=place.device)
    norms = HeadNorms(q_weight_H=weights[0].to(place.device), k_weight_H=weights[1].to(place.device), eps=EPS)
    out = rotate_into_cache(
        *(place.put(t) for t in (q, k, v)),
        cos_CH=cos.to(place.device),
        sin_CH=sin.to(place.device),
        length_B=torch.tensor(lengths, dtype=torch.int32, device=place.device),
        key_BKCH=cache[0],
        value_BKCH=cache[1],
        norms=norms if normed else None,
        rotates=rotates,
        backend=place.backend,
    )
    place.check("q", turned[0], out)
    rows = torch.arange(prompts), slice(None), torch.tensor(lengths)
    place.check("k", turned[1], cache[0][rows])
    assert cache[1][rows].flatten(1).equal(v.to(place.device))
    assert int(cache.isnan().sum()) == cache.numel() - k.numel() - v.numel()


def check_decode_inner(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, place: Place) -> None:
    tokens, width, ranks = shape
    x, other = torch.randn(2, tokens, width).to(dtype)
    weight = (1 + torch.randn(width) * 0.2).to(dtype)
    A = torch.randn(ranks, width).to(dtype)
    scale = torch.rand(ranks) + 0.5
    A_there, scale_there, weight_there = (t.to(place.device) for t in (A, scale, weight))
    exact = x.double()
    out = None
    if kind == "norm":
        exact = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        out, u = normed_inner(place.put(x), weight_there, A_there, scale_there, eps=EPS, backend=place.backend)
    elif kind == "gated":
        exact = torch.nn.functional.silu(exact) * other.double()
        out, u = gated_inner(place.put(x), place.put(other), A_there, scale_there, backend=place.backend)
    else:
        u = plain_inner(place.put(x), A_there, scale_there, backend=place.backend)
    if out is not None:
        assert out.is_contiguous()
        place.check("out", exact, out, reduction_length=width)
    assert u.shape == (tokens, ranks)
    if ranks:
        assert_close(
            "u", exact @ A.double().T * scale.double(), u, dtype=torch.float32, roundings=12, reduction_length=width
        )


def check_decode_outer(
    tokens: int, widths: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, place: Place, *, residual: bool
) -> None:
    """A rank of 0 is a projection without an adapter."""
    Bs = [torch.randn(width, rank).to(dtype) if rank else None for width, rank in zip(widths, ranks, strict=True)]
    u = torch.randn(tokens, sum(ranks))
    base = torch.randn(tokens, widths[0]).to(dtype) if residual else None
    adapters = OuterAdapters.stack(
        [None if B is None else B.to(place.device) for B in Bs], widths, dtype=dtype, device=torch.device(place.device)
    )
    there = None if base is None else base.to(place.device)
    parts = decode_outer(u.to(place.device), adapters, residual=there, backend=place.backend)
    assert len(parts) == len(widths)
    rank = 0
    for part, B, width in zip(parts, Bs, widths, strict=True):
        exact = torch.zeros(tokens, width, dtype=torch.float64)
        if B is not None:
            exact = u[:, rank : rank + B.shape[1]].double() @ B.double().T
            rank += B.shape[1]
        if base is not None:
            exact = exact + base.double()
        assert part.is_contiguous()
        assert_close("add", exact, part, dtype=torch.float32, roundings=6, reduction_length=sum(ranks))
