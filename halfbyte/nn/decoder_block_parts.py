"""What a fused decoder block is made of, what it is called with, and what its halves keep between two passes.

See `decoder_block` for what it computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from halfbyte.memory.activation_offload import ActivationOffload
from halfbyte.memory.activation_policy import BlockSizes, Policy
from halfbyte.nn.projection_group import ProjectionGroup
from halfbyte.nn.streamed_block import StreamedBlock
from halfbyte.ops.block_dropout import BlockDropout
from halfbyte.ops.workspace import Workspace

# B rows, L tokens a row, T = B L tokens, D width, N query heads, K key heads, S = N + 2 K heads in all, H head width

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q (B, N, L, H), k and v (B, K, L, H) -> (B, L, N, H)."""


class GradientSums:
    """Where gradients of adapters are added at once, instead of being handed to autograd.

    Autograd would hold the gradients of all blocks until the last is known where it is asked for them, as a graph of
    kernels must: 160 MB for a 7B model at rank 16.
    """

    def __init__(self) -> None:
        self.targets: dict[nn.Parameter, torch.Tensor] = {}
        """Empty as long as autograd is to have the gradients."""
        self.notice: Callable[[nn.Parameter], None] = _ignore
        """Is told whose gradient has been added."""

    def clear(self) -> None:
        """Leave the gradients to autograd."""
        self.targets, self.notice = {}, _ignore

    def add(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        """Add gradients to their sums, and return what is left for autograd."""
        if not self.targets:
            return gradients
        pairs = [(self.targets.get(p), g) for p, g in zip(parameters, gradients, strict=True)]
        known = [(target, gradient) for target, gradient in pairs if target is not None]
        if known:
            sums = [target for target, _ in known]
            torch._foreach_add_(sums, [gradient.to(target.dtype) for target, gradient in known])
            for parameter in parameters:
                if parameter in self.targets:
                    self.notice(parameter)
        return [gradient if target is None else None for target, gradient in pairs]


def _ignore(parameter: nn.Parameter) -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A frozen norm."""

    module: nn.Module
    eps: float

    @property
    def weight_D(self) -> torch.Tensor:
        """As it is now: models are moved and cast."""
        weight_D = self.module.weight
        assert isinstance(weight_D, torch.Tensor)
        return weight_D.detach()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockParts:
    """What a block is made of."""

    qkv: ProjectionGroup
    o: ProjectionGroup
    gate_up: ProjectionGroup
    down: ProjectionGroup
    norm1: Norm
    norm2: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    query_heads: int
    key_heads: int
    head_width: int
    rotates: bool
    workspace: Workspace
    offload: ActivationOffload
    sums: GradientSums
    """These three belong to the model."""
    streamed: StreamedBlock | None = None
    """The frozen weights, where they live in host memory."""

    def arrive(self, *, backward: bool) -> None:
        """Have the frozen weights on the device for what is launched next."""
        if self.streamed is not None:
            self.streamed.arrive(backward=backward)

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def sizes(self) -> BlockSizes:
        """Numbers a token that its parts take and give."""
        heads = 0 if self.q_norm is None else self.query_heads + self.key_heads
        return BlockSizes(
            width=self.qkv.in_features,
            qkv_width=self.qkv.out_features,
            attention_width=self.o.in_features,
            normed_width=heads * self.head_width,
            ff_width=self.down.in_features,
        )

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Of all adapters, in the order of their gradients."""
        return [parameter for group in self.groups for parameter in group.parameters]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockCall:
    """What one call has beside x and the adapters."""

    parts: BlockParts
    cos_TH: torch.Tensor
    sin_TH: torch.Tensor
    rows: int
    attend: Attend
    policy: Policy
    dropouts: tuple[BlockDropout, ...]
    """Of the inputs of qkv, o, gate_up and down."""


@dataclasses.dataclass(slots=True)
class HeadsState:
    """What lies before attention."""

    x_TD: torch.Tensor
    r_T: torch.Tensor
    u_qkv_TR: torch.Tensor
    qkv_TSH: torch.Tensor
    """Rotated, but where queries and keys are normed."""
    r_heads: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    """Queries, keys and values as the graph of attention knows them."""


@dataclasses.dataclass(slots=True)
class AttentionState:
    """What the attention half keeps."""

    heads: HeadsState
    out_TA: torch.Tensor
    u_o_TR: torch.Tensor


@dataclasses.dataclass(slots=True)
class MlpState:
    """What the MLP half keeps."""

    h_TD: torch.Tensor
    r_T: torch.Tensor
    u_gate_up_TR: torch.Tensor
    gate_up_TG: torch.Tensor | None
    """None where it is computed again."""
    u_down_TR: torch.Tensor
