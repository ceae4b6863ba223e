"""Reusable scratch buffers of one model.

Freshly allocated memory costs many times what reused memory costs (page faults on a CPU, allocator traffic on a GPU),
and the largest temporary of QLoRA, a layer's weight in 16 bits, is needed by one layer at a time. A model therefore
owns one workspace; a layer takes the buffer it needs, fills it, uses it and forgets it. A buffer grows to the largest
request of its key and is then kept.

What `take` returns is undefined memory shared with every other taker of that key: it must be filled, consumed and
dropped before the key is taken again, and never be saved for a backward. Different keys never overlap. A workspace
belongs to one model instance and one stream of execution; it is never global.
"""

from __future__ import annotations

import math

import torch


class Workspace:
    """Grown-once scratch buffers, by key and device."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.generation = 0
        """Rises when a buffer, or what a taker keeps beside it, moves: what has recorded addresses must forget them."""

    def take(self, key: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a contiguous scratch tensor with undefined contents.

        Args:
            key: What the buffer is for; takers of one key share memory.
            shape: Shape of the tensor.
            dtype: Its dtype.
            device: Where it lives.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get((key, device))
        if buffer is None or buffer.numel() < num_bytes:
            # Free the smaller buffer first, or both would be alive at the peak.
            self._buffers.pop((key, device), None)
            del buffer
            self.generation += 1
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._buffers[key, device] = buffer
        return buffer[:num_bytes].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def release(self) -> None:
        """Give all buffers back; the next `take` allocates again."""
        self._buffers.clear()
        self.generation += 1
