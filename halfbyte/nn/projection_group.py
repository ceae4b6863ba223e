"""The projections that share an input, as one product, with their adapters along for the ride.

    y = [x, u] [W, B]'        u = s d A'        d = dropout(x)

W stacks the frozen weights of the group, (F, D); A stacks its adapters' A, (R, D); B holds each adapter's B in the
rows of its projection and the columns of its rank, (F, R). So one product gives queries, keys and values with their
adapters, summed in fp32 and rounded once: an adapter's part that is small beside the base's is not rounded away.
Backward:

    [grad_base, g] = grad_y [W, B]        grad_A = s g' d        grad_B = grad_y' u
    grad_x = grad_base + dropout(s g A)

Where adapters ride (on a GPU), W and B lie side by side in one buffer, as x and u do. On a CPU, where products want
matrices without gaps, u B' is computed first and the large product is added to it, which rounds once as well.

s includes 1 / (1 - p). W is expanded into a buffer that all groups of one kind share. A backward that recomputes
expands a weight once, for the recomputation and the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.ops.block_dropout import BlockDropout
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.lora_linear import product_in
from halfbyte.ops.workspace import Workspace

# T tokens, D in_features, F out_features of the group, R ranks of the group, E = D and the spare columns

Projection = LoraLinear | Linear4bit | nn.Linear
# Spare columns come in this many, so that rows of the buffers stay aligned.
COLUMN_MULTIPLE = 16


@dataclasses.dataclass(slots=True)
class WeightOwner:
    """Whose weight the buffer of one kind holds."""

    group: ProjectionGroup | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """One projection with an adapter, and its place in the group."""

    layer: LoraLinear
    rows: slice
    ranks: slice


@dataclasses.dataclass(frozen=True, slots=True)
class _Stacks:
    """The adapters that take part, in the compute dtype."""

    members: tuple[_Member, ...]
    A_RD: torch.Tensor
    B_FR: torch.Tensor
    """Without the scaling, where all adapters have the same."""
    scaling: float
    """What B lacks."""

    @classmethod
    def empty(cls, group: ProjectionGroup, members: tuple[_Member, ...], dtype: torch.dtype) -> _Stacks:
        scalings = {member.layer.scaling for member in members}
        rank, device = group.padded_rank, group.device
        return cls(
            members=members,
            A_RD=torch.zeros(rank, group.in_features, dtype=dtype, device=device),
            B_FR=torch.zeros(group.out_features, rank, dtype=dtype, device=device),
            scaling=scalings.pop() if len(scalings) == 1 else 1.0,
        )

    def fill(self) -> None:
        """Cast the adapters anew, in one launch; what is no adapter's stays zero."""
        if not self.members:
            return
        targets = [self.A_RD[m.ranks] for m in self.members] + [self.B_FR[m.rows, m.ranks] for m in self.members]
        sources = [m.layer.lora_A.detach() for m in self.members] + [m.layer.lora_B.detach() for m in self.members]
        torch._foreach_copy_(targets, sources)
        if not self.has_common_scaling:
            for member in self.members:
                self.B_FR[member.rows, member.ranks] *= member.layer.scaling

    @property
    def has_common_scaling(self) -> bool:
        return len({member.layer.scaling for member in self.members}) == 1


class ProjectionGroup:
    """Projections of one input."""

    def __init__(
        self,
        layers: Sequence[Projection],
        *,
        kind: str,
        workspace: Workspace,
        owners: dict[str, WeightOwner],
        adapters_ride: bool,
    ) -> None:
        """Group `layers`.

        Args:
            layers: With the same in_features and, where they have adapters, the same dropout.
            kind: Groups of one kind share the buffer of their weight.
            workspace: Scratch buffers of the model.
            owners: Of the model; says which group of a kind was expanded last.
            adapters_ride: Whether adapters lie beside the weights.
        """
        self.layers, self.kind, self.workspace = tuple(layers), kind, workspace
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.adapters_ride = adapters_ride
        self._owner = owners.setdefault(kind, WeightOwner())
        self._all_members = self._place_members()
        self._stacks: _Stacks | None = None
        dropouts = {member.layer.dropout for member in self._all_members}
        assert len(dropouts) <= 1, f"adapters of {kind} drop differently: {dropouts}"
        self.dropout = dropouts.pop() if dropouts else 0.0

    @property
    def members(self) -> tuple[_Member, ...]:
        """The projections whose adapters take part."""
        return tuple(member for member in self._all_members if member.layer.adapter_enabled)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """lora_A and lora_B of each member."""
        return [parameter for member in self.members for parameter in (member.layer.lora_A, member.layer.lora_B)]

    @property
    def rank(self) -> int:
        return max((member.ranks.stop for member in self.members), default=0)

    def take_input(self, name: str, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a buffer for x, (T, E): the first D columns are the caller's to fill."""
        width = self.in_features + self._spare_columns()
        return self.workspace.take(name, (num_tokens, width), dtype=dtype, device=device)

    def forward(self, x_TE: torch.Tensor, d_TD: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply.

        Args:
            x_TE: What `take_input` returned, filled.
            d_TD: The adapters' input: the first D columns of x, or what dropout left of them.
            scale: 1 / (1 - p) where there was dropout, else 1.

        Returns:
            y (T, F), a new tensor, and s u (T, R), to keep for the backward.
        """
        width = self.in_features
        stacks = self._stack(x_TE.dtype, fill=True)
        self.forget_weight()
        weight_FE = self._expand(stacks)
        u_TR = (d_TD @ stacks.A_RD.T).mul_(stacks.scaling * scale)
        if self.adapters_ride:
            if stacks.members:
                x_TE[:, width:] = u_TR
            y_TF = x_TE @ weight_FE.T
        elif stacks.members:
            y_TF = u_TR @ stacks.B_FR.T
            y_TF.addmm_(x_TE, weight_FE.T)
        else:
            y_TF = x_TE @ weight_FE.T
        self._add_bias_(y_TF)
        return y_TF, u_TR

    def inner(self, d_TD: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Return s u alone."""
        stacks = self._stack(d_TD.dtype, fill=True)
        return (d_TD @ stacks.A_RD.T).mul_(stacks.scaling * scale)

    def backward_input(
        self, grad_y_TF: torch.Tensor, dropout: BlockDropout, *, in_parts: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Go back to the input.

        Args:
            grad_y_TF: Gradient of the group's output, contiguous.
            dropout: Of the adapters' input.
            in_parts: Whether the caller can add both parts of the gradient; ignored where adapters do not ride.

        Returns:
            In parts: grad_base (T, D), grad_u (T, R), and grad_u A (T, D), to which the dropout is still to be applied.
            Otherwise: grad_x, grad_u, None. The first and the last are buffers that the next call overwrites.
        """
        dtype, device, width = grad_y_TF.dtype, grad_y_TF.device, self.in_features
        stacks = self._stack(dtype, fill=True)
        weight_FE, factor = self._expand(stacks), stacks.scaling * dropout.scale
        num_tokens = grad_y_TF.shape[0]
        adapter_TD = self.workspace.take("group_grad_adapter", (num_tokens, width), dtype=dtype, device=device)
        if not self.rank:
            torch.mm(grad_y_TF, weight_FE, out=adapter_TD)
            return adapter_TD, grad_y_TF.new_empty(num_tokens, 0), None
        if in_parts and self.adapters_ride:
            shape = (num_tokens, weight_FE.shape[1])
            grad_TE = self.workspace.take("group_grad", shape, dtype=dtype, device=device)
            torch.mm(grad_y_TF, weight_FE, out=grad_TE)
            grad_u_TR = grad_TE[:, width:] * factor
            torch.mm(grad_u_TR, stacks.A_RD, out=adapter_TD)
            return grad_TE[:, :width], grad_u_TR, adapter_TD
        grad_u_TR = (grad_y_TF @ stacks.B_FR).mul_(factor)
        torch.mm(grad_u_TR, stacks.A_RD, out=adapter_TD)
        # The small part first: added to a large one that is already rounded, it would be rounded away.
        dropout.drop_(adapter_TD)
        return adapter_TD.addmm_(grad_y_TF, weight_FE[:, :width]), grad_u_TR, None

    def backward_adapters(
        self, grad_y_TF: torch.Tensor, grad_u_TR: torch.Tensor, d_TD: torch.Tensor, u_TR: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the gradients of `parameters`; `u_TR` is what the forward returned."""
        if not self.rank:
            return []
        grads = []
        stacks = self._stack(d_TD.dtype, fill=False)
        grad_A_RD = product_in(torch.promote_types(d_TD.dtype, torch.float32), grad_u_TR.T, d_TD)
        for member in stacks.members:
            grad_B = product_in(grad_A_RD.dtype, grad_y_TF[:, member.rows].T, u_TR[:, member.ranks])
            if not stacks.has_common_scaling:
                grad_B *= member.layer.scaling
            grads += [grad_A_RD[member.ranks], grad_B]
        return grads

    def forget_weight(self) -> None:
        """Have the next product expand the weight, whatever its buffer holds."""
        if self._owner.group is self:
            self._owner.group = None

    def _place_members(self) -> tuple[_Member, ...]:
        members, row, rank = [], 0, 0
        for layer in self.layers:
            if isinstance(layer, LoraLinear):
                members.append(_Member(layer, slice(row, row + layer.out_features), slice(rank, rank + layer.rank)))
                rank += layer.rank
            row += layer.out_features
        return tuple(members)

    @property
    def padded_rank(self) -> int:
        """Rows of the stacked A: ranks, and as many more as keep a buffer's rows aligned where adapters ride."""
        return -(-self.rank // COLUMN_MULTIPLE) * COLUMN_MULTIPLE if self.adapters_ride else self.rank

    def _spare_columns(self) -> int:
        return self.padded_rank if self.adapters_ride else 0

    def _stack(self, dtype: torch.dtype, *, fill: bool) -> _Stacks:
        """Return the stacked adapters: as they are now, or as the call before has left them."""
        members, stacks = self.members, self._stacks
        if stacks is None or stacks.members != members or stacks.A_RD.dtype != dtype:
            self._stacks = stacks = _Stacks.empty(self, members, dtype)
            fill = True
        if fill:
            stacks.fill()
        return stacks

    def _expand(self, stacks: _Stacks) -> torch.Tensor:
        """Return W, and B beside it where it rides."""
        width, dtype = self.in_features, stacks.A_RD.dtype
        shape = (self.out_features, width + self._spare_columns())
        weight_FE = self.workspace.take(f"weight_{self.kind}", shape, dtype=dtype, device=stacks.A_RD.device)
        if self._owner.group is self:
            return weight_FE
        row = 0
        for layer in self.layers:
            target = weight_FE[row : row + layer.out_features, :width]
            base = layer.base if isinstance(layer, LoraLinear) else layer
            if isinstance(base, Linear4bit):
                dequantize_4bit(base.quantized, out=target, workspace=self.workspace)
            else:
                target.copy_(base.weight.detach())
            row += layer.out_features
        if self._spare_columns():
            weight_FE[:, width:] = stacks.B_FR
        self._owner.group = self
        return weight_FE

    def _add_bias_(self, y_TF: torch.Tensor) -> None:
        if all(layer.bias is None for layer in self.layers):
            return
        row = 0
        for layer in self.layers:
            if layer.bias is not None:
                y_TF[:, row : row + layer.out_features] += layer.bias.detach().to(y_TF.dtype)
            row += layer.out_features

    @property
    def device(self) -> torch.device:
        """Where the frozen weights are."""
        layer = self.layers[0]
        base = layer.base if isinstance(layer, LoraLinear) else layer
        return base.packed.device if isinstance(base, Linear4bit) else base.weight.device
