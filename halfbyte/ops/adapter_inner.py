"""The inner product of an adapter: what its first matrix makes of the input.

    u = scale dropout(x) A'

x is tall and wide, A has a few rows, so the time is that of reading x once. Sums are fp32, rounded once. The scaling
of an adapter and 1 / (1 - p) are folded into `scale`.
"""

from __future__ import annotations

import functools

import torch

from halfbyte.kernels import adapter_inner as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.counter_dropout import CounterDropout, drop_copy

# T tokens, D features, R ranks

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# (columns a step, stages), from the fastest on an H100, which takes most shared memory.
PIPELINES = ((256, 4), (128, 4), (128, 3), (64, 3), (64, 2))
SHARED_BYTES = 99 * 2**10
"""What every card since 2020 has."""


def adapter_inner(
    x_TD: torch.Tensor,
    A_RD: torch.Tensor,
    *,
    scale: float,
    also_TR: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return u, (tokens, ranks), a new tensor of the dtype of x.

    Args:
        x_TD: (tokens, features), any floating dtype; rows of any stride.
        A_RD: (ranks, features), of the dtype of x, contiguous.
        scale: Factor of the product.
        also_TR: If given, u is written there too; rows of any stride.
        dropout: Which elements of x count as zero.
        backend: "auto", "torch" or "triton"; the kernel is for 16 bits and at most 256 ranks, which "auto" heeds.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if backend == "auto" and (x_TD.dtype not in KERNEL_DTYPES or A_RD.shape[0] > kernels.MAX_RANKS):
        backend = "torch"
    if resolve_backend("adapter_inner", backend, x_TD.device) == "torch":
        return adapter_inner_reference(x_TD, A_RD, scale=scale, also_TR=also_TR, dropout=dropout)
    return adapter_inner_triton(
        x_TD, A_RD, scale=scale, also_TR=also_TR, dropout=dropout, launch=default_launch(A_RD.shape[0], x_TD.device)
    )


@functools.cache
def default_launch(ranks: int, device: torch.device) -> kernels.AdapterInnerLaunch:
    """Return how the kernel is launched: with the longest pipeline that a multiprocessor's shared memory holds."""
    limit = SHARED_BYTES
    if device.type == "cuda":
        # Releases of torch before 2.2 do not tell.
        limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_BYTES)
    rows = kernels.AdapterInnerLaunch().tokens_per_program + max(16, 1 << (ranks - 1).bit_length())
    for columns, stages in PIPELINES:
        if 2 * rows * columns * stages <= limit:
            break
    return kernels.AdapterInnerLaunch(columns_per_step=columns, num_stages=stages)


def adapter_inner_triton(
    x_TD: torch.Tensor,
    A_RD: torch.Tensor,
    *,
    scale: float,
    also_TR: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
    launch: kernels.AdapterInnerLaunch,
) -> torch.Tensor:
    """Return u by the Triton kernel, launched as told."""
    assert A_RD.is_contiguous()
    assert x_TD.dtype == A_RD.dtype
    assert x_TD.stride(1) == 1
    assert also_TR is None or also_TR.stride(1) == 1
    u_TR = torch.empty(x_TD.shape[0], A_RD.shape[0], dtype=x_TD.dtype, device=x_TD.device)
    kernels.adapter_inner(x_TD, A_RD, scale, u_TR, also_TR, dropout=dropout, launch=launch)
    return u_TR


def adapter_inner_reference(
    x_TD: torch.Tensor,
    A_RD: torch.Tensor,
    *,
    scale: float,
    also_TR: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
) -> torch.Tensor:
    """Return u: the definition, in plain torch on any device."""
    if dropout is not None:
        x_TD = drop_copy(x_TD, dropout, out=torch.empty_like(x_TD, memory_format=torch.contiguous_format))
    u_TR = (x_TD @ A_RD.T).mul_(scale)
    if also_TR is not None:
        also_TR.copy_(u_TR)
    return u_TR
