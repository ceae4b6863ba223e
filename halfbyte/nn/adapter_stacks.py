"""The adapters of projections that share an input, one below the other in the compute dtype."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from halfbyte.kernels.adapter_stack import StackMember
from halfbyte.nn.lora import LoraLinear

if TYPE_CHECKING:
    from halfbyte.nn.projection_group import ProjectionGroup

# D in_features, F out_features, R ranks of all members


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One projection with an adapter, and its place in the group."""

    layer: LoraLinear
    rows: slice
    ranks: slice
    by_base: bool = False
    """Whether its adapter is off and what was taken out of its base stands in, see `LoraLinear.acting`."""

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What takes part as A and B."""
        acting = self.layer.acting
        assert acting is not None
        return acting


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterStacks:
    """The adapters that take part, in the compute dtype."""

    members: tuple[Member, ...]
    scaling: float
    """What B lacks: the scaling of all adapters, if they have the same, else 1."""
    A_RD: torch.Tensor
    B_FR: torch.Tensor | None
    """None where B rides, and lies beside the weight."""

    @classmethod
    def empty(cls, group: ProjectionGroup, members: tuple[Member, ...], dtype: torch.dtype) -> AdapterStacks:
        scalings = {member.layer.scaling for member in members}
        rank, device = group.padded_rank, group.device
        return cls(
            members=members,
            scaling=scalings.pop() if len(scalings) == 1 else 1.0,
            A_RD=torch.zeros(rank, group.in_features, dtype=dtype, device=device),
            B_FR=None if group.rides_in_place else torch.zeros(group.out_features, rank, dtype=dtype, device=device),
        )

    def fits(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Say whether a product in that dtype can take them."""
        return self.A_RD.dtype == dtype and self.A_RD.device == device

    def fill_A(self) -> None:
        """Cast every A anew."""
        for member in self.members:
            self.A_RD[member.ranks] = member.factors[0].detach()

    def fill(self) -> None:
        """Cast the adapters anew, where B does not ride."""
        if not self.members or self.B_FR is None:
            return
        targets = [self.A_RD[m.ranks] for m in self.members] + [self.B_FR[m.rows, m.ranks] for m in self.members]
        sources = [m.factors[0].detach() for m in self.members] + [m.factors[1].detach() for m in self.members]
        torch._foreach_copy_(targets, sources)
        for member in self.members:
            if (factor := self.factor_of(member)) != 1:
                self.B_FR[member.rows, member.ranks] *= factor

    def factor_of(self, member: Member) -> float:
        """Return the factor with which a member's B is multiplied."""
        return member.layer.scaling / self.scaling

    def as_places(self) -> list[StackMember]:
        """Return the members as the op that stacks them wants them."""
        return [
            StackMember(
                member.factors[0].detach(),
                member.factors[1].detach(),
                first_row=member.rows.start,
                first_rank=member.ranks.start,
                scaling=self.factor_of(member),
            )
            for member in self.members
        ]
