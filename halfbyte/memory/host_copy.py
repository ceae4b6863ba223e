"""Many tensors copied into host memory at once, for a moment in which training stands still.

An adapter with its optimizer's state is thousands of small tensors. Copied from a GPU one by one, each costs a wait for
the device and new pages of host memory, 40 us or more. Here those of one GPU and dtype are laid end to end there, in
pieces of up to 16 MiB, and a piece is one transfer into pinned memory, of which the copies are views. `torch.save`
writes memory that several tensors share once.

Pinned memory is torch's, which keeps what has been freed: the second snapshot of a run finds its pages in place. Torch
rounds a request up to a power of two, therefore pieces, which waste little of it. The copies are waited for one after
the other: what torch has only queued a copy into is given back by an event on the stream of that copy, and a thread
that frees a snapshot could record it while this one captures a CUDA graph.

On the CPU a tensor at a time is best, out of memory that the C library has at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

TRANSFER_BYTES = 16 << 20
"""What is copied at once; as much is taken of the GPU for a moment."""


def copy_to_host(values: Any) -> Any:
    """Return dicts, lists and tuples of numbers and tensors with every tensor copied into host memory, contiguous.

    What has been queued on the current stream of a tensor's device is waited for.
    """
    tensors: list[torch.Tensor] = []
    _map_tensors(values, tensors.append)
    copies = iter(_copy_all(tensors))
    return _map_tensors(values, lambda _: next(copies))


def _map_tensors(values: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    # Most by far: generators of random numbers, numbers of parameters.
    if type(values) in (int, float):
        return values
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, Mapping):
        return {key: _map_tensors(value, change) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([_map_tensors(value, change) for value in values])
    return values


@torch.no_grad()
def _copy_all(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    copies: dict[int, torch.Tensor] = {}
    places_of: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type == "cuda":
            places_of.setdefault((tensor.device, tensor.dtype), []).append(place)
        else:
            copies[place] = tensor.clone(memory_format=torch.contiguous_format)
    for places in places_of.values():
        flat_copies = _copy_from_gpu([tensors[place].reshape(-1) for place in places])
        for place, copy in zip(places, flat_copies, strict=True):
            copies[place] = copy.view(tensors[place].shape)
    return [copies[place] for place in range(len(tensors))]


def _copy_from_gpu(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield copies of flat tensors of one GPU and dtype in pinned memory."""
    for piece in _pieces(tensors):
        sizes = [len(tensor) for tensor in piece]
        copy = torch.empty(sum(sizes), dtype=piece[0].dtype, pin_memory=True)
        copy.copy_(piece[0] if len(piece) == 1 else torch.cat(piece))
        yield from copy.split(sizes)


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors in order, in lists of up to `TRANSFER_BYTES` together, or of one that is larger."""
    piece: list[torch.Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        if piece and num_bytes + tensor.nbytes > TRANSFER_BYTES:
            yield piece
            piece, num_bytes = [], 0
        piece.append(tensor)
        num_bytes += tensor.nbytes
    yield piece
