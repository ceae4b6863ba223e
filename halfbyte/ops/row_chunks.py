"""Matrices in chunks of rows that stay in a CPU's caches, for operations of several elementwise passes.

What a pass writes is then still near when the next one reads it, and its temporaries are small enough for the
allocator to hand out the same memory again: fresh memory costs ten times what reused memory does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Torch runs an elementwise operation on one thread below 32768 elements; twice that for each thread.
ELEMENTS_PER_THREAD = 1 << 16
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_chunked_on_cpu(x: torch.Tensor) -> bool:
    """Say whether `x` is a matrix, or heads of tokens, on a CPU, in a dtype that is computed in fp32."""
    return x.device.type == "cpu" and x.dtype in WIDE_DTYPES


def chunk_rows(x: torch.Tensor) -> int:
    """Return how many rows of `x` make a chunk."""
    return max(1, ELEMENTS_PER_THREAD * torch.get_num_threads() * x.shape[0] // max(x.numel(), 1))


def row_chunks(first: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield chunks of the rows of all tensors, as many rows each as suit the first."""
    rows = chunk_rows(first)
    return zip(first.split(rows), *(other.split(rows) for other in others), strict=True)
