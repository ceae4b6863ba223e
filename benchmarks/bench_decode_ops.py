"""What decoding one token launches beside the 4-bit products: attention over the cache and the small operations.

`us` is from a graph's replay, `us_launched` with Python launching, over buffers that together outgrow the cache: in
a step, a hundred MB of weights pass between two uses of an adapter. Attention is timed with the launch that is chosen
by itself and with others, `gb_per_s` counts the keys and values that are read. On a CPU there is no kernel to time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import num_buffer_sets, time_on_gpu
from halfbyte.kernels.decode_attention import DecodeAttentionLaunch
from halfbyte.ops.decode_attention import Angles, HeadOptions, decode_attention_triton, default_launch
from halfbyte.ops.decode_inner import gated_inner, normed_inner, plain_inner

# Prompts, query heads, key heads, length, capacity; heads of 128.
ATTENTION_SHAPES = [
    (1, 32, 32, 128, 256),
    (4, 32, 32, 128, 256),
    (1, 32, 32, 4000, 4096),
    (1, 32, 8, 128, 256),
    (1, 32, 8, 8000, 8192),
    (1, 28, 4, 128, 4096),
]
SPLITS, WARPS = (1, 2, 4, 8, 16, 32), (4, 8)
WIDTH, FEED_FORWARD, HEAD_WIDTH, RANK = 4096, 11008, 128, 16
DTYPE = torch.bfloat16
Row = dict[str, object]


def rows(device: torch.device) -> Iterator[Row]:
    """Yield one measurement for each operation, shape and launch."""
    if device.type != "cuda":
        return
    for shape in ATTENTION_SHAPES:
        yield from attention_rows(shape, device)
    for tokens in (1, 4):
        for ranks in (0, 3 * RANK):
            yield from inner_rows(tokens, ranks, device)


def attention_rows(shape: tuple[int, int, int, int, int], device: torch.device) -> Iterator[Row]:
    prompts, query_heads, key_heads, length, capacity = shape
    cache_shape = (2, prompts, key_heads, capacity, HEAD_WIDTH)
    read_bytes = 4 * prompts * key_heads * (length + 1) * HEAD_WIDTH
    caches = [torch.randn(cache_shape, dtype=DTYPE, device=device) for _ in range(num_buffer_sets(read_bytes))]
    q = torch.randn(prompts, query_heads * HEAD_WIDTH, dtype=DTYPE, device=device)
    k = torch.randn(prompts, key_heads * HEAD_WIDTH, dtype=DTYPE, device=device)
    cos, sin = torch.randn(2, capacity, HEAD_WIDTH, dtype=DTYPE, device=device)
    options = HeadOptions(scale=0.1, angles=Angles(cos_CH=cos, sin_CH=sin))
    length_B = torch.full((prompts,), length, dtype=torch.int32, device=device)
    chosen = default_launch(query_heads, caches[0].shape[1:])
    others = [
        DecodeAttentionLaunch(num_splits=splits, keys_per_step=keys, num_warps=warps)
        for splits in SPLITS
        for keys in (chosen.keys_per_step, chosen.keys_per_step // 2)
        for warps in WARPS
    ]
    for launch in (chosen, *others):
        attend = functools.partial(decode_attention_triton, options=options, launch=launch)
        calls = [functools.partial(attend, q, k, k, length_B, cache[0], cache[1]) for cache in caches]
        row = timed("decode_attention", str(shape), calls)
        speed = round(read_bytes / float(str(row["us"])) / 1e3)
        yield row | {"gb_per_s": speed, "launch": str(launch), "chosen": launch is chosen}


def inner_rows(tokens: int, ranks: int, device: torch.device) -> Iterator[Row]:
    x = torch.randn(tokens, WIDTH, dtype=DTYPE, device=device)
    gate, up = torch.randn(2, tokens, FEED_FORWARD, dtype=DTYPE, device=device)
    weight, scale = torch.ones(WIDTH, dtype=DTYPE, device=device), torch.ones(ranks, device=device)
    sets = num_buffer_sets(2 * max(ranks, 16) * WIDTH)
    As = [torch.randn(ranks, WIDTH, dtype=DTYPE, device=device) for _ in range(sets)]
    shape = f"{tokens} x {WIDTH}, {ranks} ranks"
    yield timed("normed_inner", shape, [functools.partial(normed_inner, x, weight, A, scale, eps=1e-5) for A in As])
    if ranks:
        yield timed("plain_inner", shape, [functools.partial(plain_inner, x, A, scale) for A in As])
    ranks //= 3
    As = [torch.randn(ranks, FEED_FORWARD, dtype=DTYPE, device=device) for _ in range(sets)]
    calls = [functools.partial(gated_inner, gate, up, A, scale[:ranks]) for A in As]
    yield timed("gated_inner", f"{tokens} x {FEED_FORWARD}, {ranks} ranks", calls)


def timed(op: str, shape: str, calls: list[Callable[[], object]]) -> Row:
    replayed, launched = time_on_gpu(calls)
    return {"op": op, "shape": shape, "us": round(1e3 * replayed, 2), "us_launched": round(1e3 * launched, 1)}
