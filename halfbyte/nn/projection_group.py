"""The projections that share an input, as one product, with their adapters along for the ride.

    y = [x, u] [W, s B]'        u = d A'        d = dropout(x)

W stacks the frozen weights of the group, (F, D); A stacks its adapters' A, (R, D); B holds each adapter's B in the
rows of its projection and the columns of its rank, (F, R). So one product gives queries, keys and values with their
adapters, summed in fp32 and rounded once: an adapter's part that is small beside the base's is not rounded away.
Backward:

    [grad_base, grad_u] = grad_y [W, s B]        grad_A = grad_u' d        grad_B = s grad_y' u
    grad_x = grad_base + dropout(grad_u A)

Where adapters ride (on a GPU), W and s B lie side by side in one buffer, as x and u do. On a CPU, where products want
matrices without gaps, u (s B)' is computed first and the large product is added to it, which rounds once as well.

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
            y (T, F), a new tensor, and u (T, R), to keep for the backward.
        """
        rank, width = self.rank, self.in_features
        self.forget_weight()
        weight_FE = self._expand(x_TE.dtype, scale)
        u_TR = self.inner(d_TD)
        if not rank:
            y_TF = x_TE @ weight_FE.T
        elif self.adapters_ride:
            x_TE[:, width : width + rank] = u_TR
            x_TE[:, width + rank :] = 0
            y_TF = x_TE @ weight_FE.T
        else:
            y_TF = u_TR @ self._stack_B(x_TE.dtype, scale).T
            y_TF.addmm_(x_TE, weight_FE.T)
        self._add_bias_(y_TF)
        return y_TF, u_TR

    def inner(self, d_TD: torch.Tensor) -> torch.Tensor:
        """Return u alone."""
        return d_TD @ self._stack_A(d_TD.dtype).T if self.rank else d_TD.new_empty(d_TD.shape[0], 0)

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
        weight_FE = self._expand(dtype, dropout.scale)
        num_tokens = grad_y_TF.shape[0]
        adapter_TD = self.workspace.take("group_grad_adapter", (num_tokens, width), dtype=dtype, device=device)
        if not self.rank:
            torch.mm(grad_y_TF, weight_FE, out=adapter_TD)
            return adapter_TD, grad_y_TF.new_empty(num_tokens, 0), None
        if in_parts and self.adapters_ride:
            shape = (num_tokens, weight_FE.shape[1])
            grad_TE = self.workspace.take("group_grad", shape, dtype=dtype, device=device)
            torch.mm(grad_y_TF, weight_FE, out=grad_TE)
            grad_u_TR = grad_TE[:, width : width + self.rank].contiguous()
            torch.mm(grad_u_TR, self._stack_A(dtype), out=adapter_TD)
            return grad_TE[:, :width], grad_u_TR, adapter_TD
        grad_u_TR = grad_y_TF @ self._stack_B(dtype, dropout.scale)
        torch.mm(grad_u_TR, self._stack_A(dtype), out=adapter_TD)
        # The small part first: added to a large one that is already rounded, it would be rounded away.
        dropout.drop_(adapter_TD)
        return adapter_TD.addmm_(grad_y_TF, weight_FE[:, :width]), grad_u_TR, None

    def backward_adapters(
        self, grad_y_TF: torch.Tensor, grad_u_TR: torch.Tensor, d_TD: torch.Tensor, u_TR: torch.Tensor, *, scale: float
    ) -> list[torch.Tensor]:
        """Return the gradients of `parameters`."""
        if not self.rank:
            return []
        grads = []
        grad_A_RD = product_in(torch.promote_types(d_TD.dtype, torch.float32), grad_u_TR.T, d_TD)
        for member in self.members:
            u = u_TR[:, member.ranks]
            grad_B = product_in(grad_A_RD.dtype, grad_y_TF[:, member.rows].T, u).mul_(member.layer.scaling * scale)
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

    def _spare_columns(self) -> int:
        return -(-self.rank // COLUMN_MULTIPLE) * COLUMN_MULTIPLE if self.adapters_ride else 0

    def _stack_A(self, dtype: torch.dtype) -> torch.Tensor:
        """Return A; rows of an adapter that does not take part are zero."""
        stacked_RD = torch.zeros(self.rank, self.in_features, dtype=dtype, device=self._device)
        for member in self.members:
            stacked_RD[member.ranks] = member.layer.lora_A.detach()
        return stacked_RD

    def _stack_B(self, dtype: torch.dtype, scale: float) -> torch.Tensor:
        stacked_FR = torch.zeros(self.out_features, self.rank, dtype=dtype, device=self._device)
        self._write_B(stacked_FR, scale)
        return stacked_FR

    def _write_B(self, target_FR: torch.Tensor, scale: float) -> None:
        for member in self.members:
            target_FR[member.rows, member.ranks] = member.layer.lora_B.detach() * (member.layer.scaling * scale)

    def _expand(self, dtype: torch.dtype, scale: float) -> torch.Tensor:
        """Return W, and s B beside it where it rides."""
        width, spare = self.in_features, self._spare_columns()
        shape = (self.out_features, width + spare)
        weight_FE = self.workspace.take(f"weight_{self.kind}", shape, dtype=dtype, device=self._device)
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
        if spare:
            weight_FE[:, width:] = 0
            self._write_B(weight_FE[:, width:], scale)
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
    def _device(self) -> torch.device:
        layer = self.layers[0]
        base = layer.base if isinstance(layer, LoraLinear) else layer
        return base.packed.device if isinstance(base, Linear4bit) else base.weight.device
