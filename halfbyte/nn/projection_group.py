"""The projections that share an input, as one product, with their adapters along for the ride.

    y = [x, u] [W, B]'        u = s d A'        d = dropout(x)

W stacks the frozen weights of the group, (F, D); A stacks its adapters' A, (R, D); B holds each adapter's B in the
rows of its projection and the columns of its rank, (F, R). So one product gives queries, keys and values with their
adapters, summed in fp32 and rounded once: an adapter's part that is small beside the base's is not rounded away.
Backward:

    [grad_base, g] = grad_y [W, B]        grad_A = s g' d        grad_B = grad_y' u
    grad_x = grad_base + dropout(s g A)

Where adapters ride (on a GPU), W and B lie side by side in one buffer, as x and u do, and d is never written: dropout
happens inside the product that gives u. On a CPU, where products want matrices without gaps, u B' is computed first and
the large product is added to it, which rounds once as well.

With fp8 products neither holds: see `fp8_weights`. There is one form of it for all devices, u and B always apart.

s includes 1 / (1 - p). W is expanded into a buffer that all groups of one kind share. A backward that recomputes
expands a weight once, for the recomputation and the gradient. Adapters are cast in every forward; the backward finds
them as that left them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from halfbyte.nn.adapter_stacks import AdapterStacks, Member
from halfbyte.nn.fp8_weights import Fp8Weights
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.ops.adapter_inner import adapter_inner
from halfbyte.ops.adapter_stack import stack_adapters
from halfbyte.ops.block_dropout import BlockDropout
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.lora_linear import product_in
from halfbyte.ops.workspace import Workspace

# T tokens, D in_features, F out_features of the group, R ranks of the group, E = D and the spare columns

Projection = LoraLinear | Linear4bit | nn.Linear
Products = Literal["16bit", "fp8"]
# Spare columns come in this many, so that rows of the buffers stay aligned.
COLUMN_MULTIPLE = 16


@dataclasses.dataclass(slots=True)
class WeightOwner:
    """Whose weight the buffer of one kind holds."""

    group: ProjectionGroup | None = None


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
        products: Products = "16bit",
    ) -> None:
        """Group `layers`.

        Args:
            layers: With the same in_features and, where they have adapters, the same dropout.
            kind: Groups of one kind share the buffer of their weight.
            workspace: Scratch buffers of the model.
            owners: Of the model; says which group of a kind was expanded last.
            adapters_ride: Whether adapters lie beside the weights, and dropout goes by a counter.
            products: What frozen weights are multiplied in.
        """
        self.layers, self.kind, self.workspace = tuple(layers), kind, workspace
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.adapters_ride = adapters_ride
        self.fp8_weights = Fp8Weights([_base_of(layer) for layer in layers], workspace) if products == "fp8" else None
        self._owner = owners.setdefault(kind, WeightOwner())
        self._all_members = self._place_members()
        self._stacks: AdapterStacks | None = None
        dropouts = {member.layer.dropout for member in self._all_members}
        assert len(dropouts) <= 1, f"adapters of {kind} drop differently: {dropouts}"
        self._dropout = dropouts.pop() if dropouts else 0.0

    @property
    def members(self) -> tuple[Member, ...]:
        """The projections whose adapters take part."""
        acting = (member for member in self._all_members if member.layer.acting is not None)
        return tuple(dataclasses.replace(m, by_base=True) if not m.layer.adapter_enabled else m for m in acting)

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of the adapters' input in training."""
        return 0.0 if any(member.by_base for member in self.members) else self._dropout

    @property
    def parameters(self) -> list[torch.Tensor]:
        """A and B of each member."""
        return [factor for member in self.members for factor in member.factors]

    @property
    def rank(self) -> int:
        return max((member.ranks.stop for member in self.members), default=0)

    def take_input(self, name: str, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a buffer for x, (T, E): the first D columns are the caller's to fill."""
        width = self.in_features + self._spare_columns()
        return self.workspace.take(name, (num_tokens, width), dtype=dtype, device=device)

    def forward(self, x_TE: torch.Tensor, dropout: BlockDropout) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply.

        Args:
            x_TE: What `take_input` returned, filled.
            dropout: Of the adapters' input.

        Returns:
            y (T, F), a new tensor, and s u (T, R), to keep for the backward.
        """
        stacks = self._stack(x_TE.dtype)
        self.forget_weight()
        if self.fp8_weights is not None:
            if stacks.members:
                assert stacks.B_FR is not None
                stack_adapters(stacks.as_places(), A_RD=stacks.A_RD, columns_FR=stacks.B_FR)
            u_TR = self.inner(x_TE, dropout)
            y_TF = self.fp8_weights.forward(x_TE, *((u_TR, stacks.B_FR) if stacks.members else (None, None)))
        elif self.adapters_ride:
            weight_FE = self._expand(stacks, cast_A=True)
            u_TR = self.inner(x_TE[:, : self.in_features], dropout, also_TR=x_TE[:, self.in_features :])
            y_TF = x_TE @ weight_FE.T
        else:
            stacks.fill()
            weight_FD = self._expand(stacks)
            u_TR = self.inner(x_TE, dropout)
            if stacks.B_FR is not None and stacks.members:
                y_TF = (u_TR @ stacks.B_FR.T).addmm_(x_TE, weight_FD.T)
            else:
                y_TF = x_TE @ weight_FD.T
        self._add_bias_(y_TF)
        return y_TF, u_TR

    def inner(self, x_TD: torch.Tensor, dropout: BlockDropout, *, also_TR: torch.Tensor | None = None) -> torch.Tensor:
        """Return s u of an input, with A as the last forward has cast it; `also_TR` is written as well."""
        stacks = self._stack(x_TD.dtype)
        scale = stacks.scaling * dropout.scale
        if not stacks.members:
            return x_TD.new_zeros(x_TD.shape[0], stacks.A_RD.shape[0])
        if dropout.counter is None:
            x_TD = dropout.dropped(x_TD, self.workspace)
        return adapter_inner(x_TD, stacks.A_RD, scale=scale, also_TR=also_TR, dropout=dropout.counter)

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
        stacks = self._stack(dtype)
        if self.fp8_weights is not None:
            return self._backward_input_fp8(grad_y_TF, self.fp8_weights, dropout, in_parts=in_parts)
        weight_FE = self._expand(stacks)
        num_tokens = grad_y_TF.shape[0]
        adapter_TD = self.workspace.take("group_grad_adapter", (num_tokens, width), dtype=dtype, device=device)
        if not self.rank:
            torch.mm(grad_y_TF, weight_FE, out=adapter_TD)
            return adapter_TD, grad_y_TF.new_empty(num_tokens, 0), None
        if in_parts and self.adapters_ride:
            shape = (num_tokens, weight_FE.shape[1])
            grad_TE = self.workspace.take("group_grad", shape, dtype=dtype, device=device)
            torch.mm(grad_y_TF, weight_FE, out=grad_TE)
            grad_u_TR = grad_TE[:, width:] * (stacks.scaling * dropout.scale)
            torch.mm(grad_u_TR, stacks.A_RD, out=adapter_TD)
            return grad_TE[:, :width], grad_u_TR, adapter_TD
        grad_u_TR = self.backward_inner(grad_y_TF, dropout)
        torch.mm(grad_u_TR, stacks.A_RD, out=adapter_TD)
        # The small part first: added to a large one that is already rounded, it would be rounded away.
        dropout.drop_(adapter_TD)
        return adapter_TD.addmm_(grad_y_TF, weight_FE[:, :width]), grad_u_TR, None

    def _backward_input_fp8(
        self, grad_y_TF: torch.Tensor, weights: Fp8Weights, dropout: BlockDropout, *, in_parts: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        shape, dtype, device = (grad_y_TF.shape[0], self.in_features), grad_y_TF.dtype, grad_y_TF.device
        grad_TD = self.workspace.take("group_grad", shape, dtype=dtype, device=device)
        weights.backward(grad_y_TF, out=grad_TD)
        if not self.rank:
            return grad_TD, grad_y_TF.new_empty(shape[0], 0), None
        grad_u_TR = self.backward_inner(grad_y_TF, dropout)
        adapter_TD = self.workspace.take("group_grad_adapter", shape, dtype=dtype, device=device)
        torch.mm(grad_u_TR, self._stack(dtype).A_RD, out=adapter_TD)
        if in_parts and self.adapters_ride:
            return grad_TD, grad_u_TR, adapter_TD
        return dropout.drop_(adapter_TD).add_(grad_TD), grad_u_TR, None

    def backward_inner(self, grad_y_TF: torch.Tensor, dropout: BlockDropout) -> torch.Tensor:
        """Return grad_u (T, R) alone, for a group whose input wants no gradient."""
        stacks = self._stack(grad_y_TF.dtype)
        B_FR = self._expand(stacks)[:, self.in_features :] if stacks.B_FR is None else stacks.B_FR
        return (grad_y_TF @ B_FR).mul_(stacks.scaling * dropout.scale)

    def backward_adapters(
        self,
        grad_y_TF: torch.Tensor,
        grad_u_TR: torch.Tensor,
        d_TD: torch.Tensor,
        u_TR: torch.Tensor,
        *,
        weight_D: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Return the gradients of `parameters`.

        Args:
            grad_y_TF: Gradient of the group's output.
            grad_u_TR: What `backward_input` returned.
            d_TD: The adapters' input.
            u_TR: What the forward returned.
            weight_D: A factor of the adapters' input that `d_TD` lacks.
        """
        if not self.rank:
            return []
        grads = []
        stacks = self._stack(d_TD.dtype)
        grad_A_RD = product_in(torch.promote_types(d_TD.dtype, torch.float32), grad_u_TR.T, d_TD)
        if weight_D is not None:
            grad_A_RD *= weight_D
        for member in stacks.members:
            grad_B = product_in(grad_A_RD.dtype, grad_y_TF[:, member.rows].T, u_TR[:, member.ranks])
            if (factor := stacks.factor_of(member)) != 1:
                grad_B *= factor
            grads += [grad_A_RD[member.ranks], grad_B]
        return grads

    def forget_weight(self) -> None:
        """Have the next product expand the weight, whatever its buffer holds."""
        if self._owner.group is self:
            self._owner.group = None

    def _place_members(self) -> tuple[Member, ...]:
        members, row, rank = [], 0, 0
        for layer in self.layers:
            if isinstance(layer, LoraLinear):
                members.append(Member(layer, slice(row, row + layer.out_features), slice(rank, rank + layer.rank)))
                rank += layer.rank
            row += layer.out_features
        return tuple(members)

    @property
    def rides_in_place(self) -> bool:
        """Whether x and W are 16 bits wide and have spare columns."""
        return self.adapters_ride and self.fp8_weights is None

    @property
    def padded_rank(self) -> int:
        """Rows of the stacked A: ranks, and as many more as keep a buffer's rows aligned where adapters ride."""
        is_padded = self.adapters_ride or self.fp8_weights is not None
        return -(-self.rank // COLUMN_MULTIPLE) * COLUMN_MULTIPLE if is_padded else self.rank

    def _spare_columns(self) -> int:
        return self.padded_rank if self.rides_in_place else 0

    def _stack(self, dtype: torch.dtype) -> AdapterStacks:
        """Return the stacked adapters as the last forward has left them."""
        members, stacks = self.members, self._stacks
        if stacks is None or stacks.members != members or not stacks.fits(dtype, self.device):
            self._stacks = stacks = AdapterStacks.empty(self, members, dtype)
            self.workspace.generation += 1
            stacks.fill_A()
            stacks.fill()
        return stacks

    def _expand(self, stacks: AdapterStacks, *, cast_A: bool = False) -> torch.Tensor:
        """Return W, and B beside it where it rides; `cast_A` then casts every A on the way."""
        width, dtype = self.in_features, stacks.A_RD.dtype
        shape = (self.out_features, width + self._spare_columns())
        weight_FE = self.workspace.take(f"weight_{self.kind}", shape, dtype=dtype, device=stacks.A_RD.device)
        if self._owner.group is self:
            return weight_FE
        row = 0
        for layer in self.layers:
            target = weight_FE[row : row + layer.out_features, :width]
            base = _base_of(layer)
            if isinstance(base, Linear4bit):
                dequantize_4bit(base.quantized, out=target, workspace=self.workspace)
            else:
                target.copy_(base.weight.detach())
            row += layer.out_features
        if self._spare_columns():
            A_RD = stacks.A_RD if cast_A else None
            stack_adapters(stacks.as_places(), A_RD=A_RD, columns_FR=weight_FE[:, width:])
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
        """Where products run."""
        base = _base_of(self.layers[0])
        return base.compute_device if isinstance(base, Linear4bit) else base.weight.device


def _base_of(layer: Projection) -> Linear4bit | nn.Linear:
    return layer.base if isinstance(layer, LoraLinear) else layer
