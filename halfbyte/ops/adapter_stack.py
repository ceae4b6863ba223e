"""Cast the adapters of projections that share an input to where their product reads them.

    A_RD[ranks of m] = A_m        columns_FR[rows of m, ranks of m] = scaling_m B_m, zero elsewhere

Adapters are fp32 masters; products want them in the compute dtype, A stacked, and B beside the stacked weights. See
`halfbyte.nn.projection_group`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from halfbyte.kernels import adapter_stack as kernels
from halfbyte.kernels.adapter_stack import StackMember
from halfbyte.ops.backend import resolve_backend

# F out_features of all projections, f of one, D in_features, R ranks of all adapters, r of one


def stack_adapters(
    members: Sequence[StackMember], *, A_RD: torch.Tensor | None, columns_FR: torch.Tensor, backend: str = "auto"
) -> None:
    """Write the members' A to the first rows of `A_RD`, unless it is None, and their B to all of `columns_FR`.

    Args:
        members: At least one, in the order of their ranks, which follow one another from 0.
        A_RD: (ranks or more, in_features), contiguous; rows beyond the ranks stay as they are.
        columns_FR: (out_features, ranks or more), rows of any stride; what is no member's becomes zero.
        backend: "auto" (by device), "torch" or "triton"; the kernel takes up to three members.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if backend == "auto" and len(members) > kernels.MAX_MEMBERS:
        backend = "torch"
    if resolve_backend("stack_adapters", backend, columns_FR.device) == "torch":
        stack_adapters_reference(members, A_RD=A_RD, columns_FR=columns_FR)
        return
    assert all(m.A_rD.is_contiguous() and m.B_fr.is_contiguous() for m in members)
    kernels.stack_adapters(members, A_RD, columns_FR)


def stack_adapters_reference(
    members: Sequence[StackMember], *, A_RD: torch.Tensor | None, columns_FR: torch.Tensor
) -> None:
    """Do the same: the definition, in plain torch on any device."""
    columns_FR.zero_()
    for member in members:
        num_rows, num_ranks = member.B_fr.shape
        rows = slice(member.first_row, member.first_row + num_rows)
        ranks = slice(member.first_rank, member.first_rank + num_ranks)
        columns_FR[rows, ranks] = member.B_fr * member.scaling
        if A_RD is not None:
            A_RD[ranks] = member.A_rD
