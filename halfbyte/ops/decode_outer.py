"""The adapters' outer product of a few new tokens, for all projections of a group, and the residual with it.

    add_p = u[:, ranks of p] B_p'  (+ residual)

in fp32: what a 4-bit product takes as `add`, so that base, adapter and residual are rounded once together. Each
projection's part is contiguous.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from halfbyte.kernels import decode_outer as kernels
from halfbyte.ops.backend import resolve_backend

# T tokens, F out_features of a group, R ranks of a group, M the most ranks of one projection


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OuterAdapters:
    """What a group's adapters are on their output side."""

    B_FM: torch.Tensor
    """The B of one projection below the other's, with zeros beside those of fewer ranks and where there is none."""
    widths: tuple[int, ...]
    first_ranks: tuple[int, ...]
    """Where in u each projection's ranks start."""
    tiles: torch.Tensor
    """What the kernel's programs do."""

    @classmethod
    def stack(
        cls, Bs: Sequence[torch.Tensor | None], widths: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> OuterAdapters:
        """Stack the B of each projection, (width, ranks); None where it has no adapter."""
        most = max((B.shape[1] for B in Bs if B is not None), default=0)
        B_FM = torch.zeros(sum(widths), most, dtype=dtype, device=device)
        first_ranks, row, rank = [], 0, 0
        for B, width in zip(Bs, widths, strict=True):
            first_ranks.append(rank if B is not None else 0)
            if B is not None:
                B_FM[row : row + width, : B.shape[1]] = B
                rank += B.shape[1]
            row += width
        tiles = kernels.make_tiles(list(widths), first_ranks, device)
        return cls(B_FM=B_FM, widths=tuple(widths), first_ranks=tuple(first_ranks), tiles=tiles)


def decode_outer(
    u_TR: torch.Tensor, adapters: OuterAdapters, *, residual: torch.Tensor | None = None, backend: str = "auto"
) -> list[torch.Tensor]:
    """Multiply.

    Args:
        u_TR: (tokens, ranks), fp32, contiguous; at least one rank.
        adapters: Of the group.
        residual: (tokens, width), contiguous, added; for a group of one projection.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        (tokens, width) of each projection, fp32, contiguous.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    assert residual is None or len(adapters.widths) == 1
    num_tokens = u_TR.shape[0]
    if resolve_backend("decode_outer", backend, u_TR.device) == "torch":
        return _decode_outer_reference(u_TR, adapters, residual)
    assert u_TR.is_contiguous()
    assert residual is None or (residual.is_contiguous() and residual.shape == (num_tokens, adapters.widths[0]))
    out = torch.empty(num_tokens * sum(adapters.widths), dtype=torch.float32, device=u_TR.device)
    kernels.decode_outer(u_TR, adapters.B_FM, adapters.tiles, out, residual=residual)
    parts = out.split([num_tokens * width for width in adapters.widths])
    return [part.view(num_tokens, width) for part, width in zip(parts, adapters.widths, strict=True)]


def _decode_outer_reference(
    u_TR: torch.Tensor, adapters: OuterAdapters, residual: torch.Tensor | None
) -> list[torch.Tensor]:
    parts = []
    for B_FM, first_rank in zip(adapters.B_FM.float().split(list(adapters.widths)), adapters.first_ranks, strict=True):
        u_TM = u_TR[:, first_rank : first_rank + B_FM.shape[1]]
        parts.append(u_TM @ B_FM[:, : u_TM.shape[1]].T)
    if residual is not None:
        parts[0] += residual
    return parts
