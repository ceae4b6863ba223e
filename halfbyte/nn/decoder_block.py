"""A decoder block of the Llama family with a hand-written backward.

    h = x + O(attention(rotate(Q n1), rotate(K n1), V n1))      n1 = norm(x)
    y = h + Down(silu(Gate n2) * Up n2)                         n2 = norm(h)

Q, K, V, O, Gate, Up, Down are frozen projections with adapters, see `projection_group`. What is kept for the backward
is a policy; the gradients do not depend on it:

    keep        x, h, the products q k v and gate up, attention's own, and what is narrow: (6 D + 2 F) numbers a token
    mlp         without gate up, which is multiplied again from h
    block       x alone; the block is computed again

Norm outputs and the gated product are never kept: computing them again costs one pass over memory. Without dropout
the adapters of q, k, v, gate and up do not even ask for that: n = r w x, so  grad_A = g' n = ((r g)' x) w.

Attention is not ours: what is called for q, k and v records its own graph, which the backward asks for gradients.

Price: no second derivative, and weights of norms get no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from halfbyte.nn.projection_group import ProjectionGroup
from halfbyte.ops.block_dropout import BlockDropout, draw_block_dropout
from halfbyte.ops.counter_dropout import DropoutSeeds
from halfbyte.ops.rms_norm import rms_norm, rms_norm_backward
from halfbyte.ops.rotary import move_heads, rotate, rotate_
from halfbyte.ops.swiglu import swiglu, swiglu_backward_
from halfbyte.ops.workspace import Workspace

# B rows, L tokens a row, T = B L tokens, D width, N query heads, K key heads, S = N + 2 K heads in all, H head width

Policy = Literal["keep", "mlp", "block"]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q (B, N, L, H), k and v (B, K, L, H) -> (B, L, N, H)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A frozen norm."""

    weight_D: torch.Tensor
    eps: float


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

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def kept_numbers(self, policy: Policy) -> int:
        """Return how many numbers a token a block keeps for its backward, those of ranks left out."""
        width = self.qkv.in_features
        if policy == "block":
            return width
        heads = self.qkv.out_features + self.o.in_features
        if self.q_norm is not None:
            heads += (self.query_heads + self.key_heads) * self.head_width
        return 2 * width + heads + (self.gate_up.out_features if policy == "keep" else 0)

    @property
    def parameters(self) -> list[nn.Parameter]:
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
class AttentionState:
    """What the attention half keeps."""

    x_TD: torch.Tensor
    r_T: torch.Tensor
    u_qkv_TR: torch.Tensor
    qkv_TSH: torch.Tensor
    """Rotated, but where queries and keys are normed."""
    r_heads: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    """Queries, keys and values as the graph of attention knows them."""
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


def decoder_block(
    x_BLD: torch.Tensor,
    parts: BlockParts,
    *,
    cos_BLH: torch.Tensor,
    sin_BLH: torch.Tensor,
    attend: Attend,
    policy: Policy,
    training: bool,
    seeds: DropoutSeeds,
) -> torch.Tensor:
    """Return the block's output, of the shape and dtype of `x_BLD`.

    Args:
        x_BLD: (rows, tokens, width) in the compute dtype.
        parts: The block.
        cos_BLH: Cosines of each token's position, (rows or 1, tokens, head width).
        sin_BLH: Sines.
        attend: Attention with everything that it needs to know bound to it.
        policy: What is kept for the backward.
        training: Whether adapters drop elements of their input.
        seeds: Of dropout by a counter.
    """
    rows, _, width = x_BLD.shape
    x_TD = x_BLD.reshape(-1, width)
    cos_TH, sin_TH = (t.expand(rows, -1, -1).reshape(x_TD.shape[0], -1) for t in (cos_BLH, sin_BLH))
    call = BlockCall(
        parts=parts,
        cos_TH=cos_TH,
        sin_TH=sin_TH,
        rows=rows,
        attend=attend,
        policy=policy,
        dropouts=tuple(
            draw_block_dropout(group.dropout if training else 0.0, by_counter=group.adapters_ride, seeds=seeds)
            for group in parts.groups
        ),
    )
    parameters = parts.parameters
    if torch.is_grad_enabled() and (x_BLD.requires_grad or any(p.requires_grad for p in parameters)):
        y_TD = _DecoderBlock.apply(x_TD, call, *parameters)
    else:
        o_TD = _attention_forward(x_TD, call, record=False)[1]
        y_TD = _mlp_forward(x_TD, o_TD, call)[1]
    return y_TD.view(x_BLD.shape)


class _DecoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, call: BlockCall, *parameters: torch.Tensor) -> torch.Tensor:
        attention, o_TD = _attention_forward(x_TD, call, record=call.policy != "block")
        mlp, y_TD = _mlp_forward(x_TD, o_TD, call)
        if call.policy != "keep":
            mlp.gate_up_TG = None
        ctx.call = call
        ctx.states = None if call.policy == "block" else (attention, mlp)
        # Only to notice an adapter that is changed in place before the backward.
        ctx.save_for_backward(x_TD, *parameters)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: torch.Tensor) -> tuple[Any, ...]:
        call, x_TD = ctx.call, ctx.saved_tensors[0]
        for group in call.parts.groups:
            group.forget_weight()
        # None by policy, or because this is not the first backward of a graph that was retained.
        if ctx.states is None:
            attention, o_TD = _attention_forward(x_TD, call, record=True)
            mlp = _mlp_forward(x_TD, o_TD, call, for_backward=True)[0]
        else:
            attention, mlp = ctx.states
            ctx.states = None
        grad_h_TD, mlp_grads = _mlp_backward(grad_y_TD.contiguous(), mlp, call)
        del mlp
        grad_x_TD, attention_grads = _attention_backward(grad_h_TD, attention, call, wanted=ctx.needs_input_grad[0])
        return grad_x_TD, None, *attention_grads, *mlp_grads


def _normed_input(
    x_TD: torch.Tensor, norm: Norm, group: ProjectionGroup, workspace: Workspace, *, addend_: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return r, and the norm of x, to which `addend_` is added in place, in the buffer of a group's input."""
    x_TE = group.take_input("group_input", x_TD.shape[0], dtype=x_TD.dtype, device=x_TD.device)
    n_TD = x_TE[:, : x_TD.shape[1]]
    return rms_norm(x_TD, norm.weight_D, eps=norm.eps, out=n_TD, addend_=addend_), x_TE


def _attention_forward(x_TD: torch.Tensor, call: BlockCall, *, record: bool) -> tuple[AttentionState, torch.Tensor]:
    """Return what the backward needs, and O's product; `record` says whether there will be a backward of this pass."""
    parts, workspace = call.parts, call.parts.workspace
    r_T, x_TE = _normed_input(x_TD, parts.norm1, parts.qkv, workspace)
    qkv_TF, u_qkv_TR = parts.qkv.forward(x_TE, call.dropouts[0])
    qkv_TSH = qkv_TF.view(x_TD.shape[0], -1, parts.head_width)
    rotated_TSH, r_heads = _rotate_heads(qkv_TSH, call)
    inputs = _as_attention_inputs(qkv_TSH, rotated_TSH, call)
    with torch.set_grad_enabled(record):
        out_BLNH = call.attend(*inputs)
        out_TA = out_BLNH.reshape(x_TD.shape[0], -1)
    a_TE = parts.o.take_input("group_input", out_TA.shape[0], dtype=out_TA.dtype, device=out_TA.device)
    a_TNH = a_TE[:, : out_TA.shape[1]].unflatten(1, (-1, parts.head_width))
    move_heads(out_BLNH.detach(), out_TNH=a_TNH)
    o_TD, u_o_TR = parts.o.forward(a_TE, call.dropouts[1])
    return AttentionState(x_TD, r_T, u_qkv_TR, qkv_TSH, r_heads, inputs, out_TA, u_o_TR), o_TD


def _rotate_heads(qkv_TSH: torch.Tensor, call: BlockCall) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return rotated queries and keys, and the r of their norms; the products stay only where they are normed."""
    parts = call.parts
    num_heads = parts.query_heads + parts.key_heads
    turned = qkv_TSH[:, :num_heads]
    r_heads: tuple[torch.Tensor, ...] = ()
    if parts.q_norm is not None and parts.k_norm is not None:
        turned = torch.empty_like(turned, memory_format=torch.contiguous_format)
        ranges = (slice(0, parts.query_heads), slice(parts.query_heads, num_heads))
        r_heads = tuple(
            rms_norm(qkv_TSH[:, heads], norm.weight_D, eps=norm.eps, out=turned[:, heads])
            for heads, norm in zip(ranges, (parts.q_norm, parts.k_norm), strict=True)
        )
    if parts.rotates:
        rotate_(turned, call.cos_TH, call.sin_TH)
    return turned, r_heads


def _as_attention_inputs(
    qkv_TSH: torch.Tensor, rotated_TSH: torch.Tensor, call: BlockCall
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values, (B, heads, L, H), as leaves of a graph of their own."""
    parts = call.parts
    num_heads = parts.query_heads + parts.key_heads
    q, k = rotated_TSH[:, : parts.query_heads], rotated_TSH[:, parts.query_heads :]
    leaves = (t.unflatten(0, (call.rows, -1)).transpose(1, 2).detach() for t in (q, k, qkv_TSH[:, num_heads:]))
    q, k, v = (leaf.requires_grad_() for leaf in leaves)
    return q, k, v


def _mlp_forward(
    x_TD: torch.Tensor, o_TD: torch.Tensor, call: BlockCall, *, for_backward: bool = False
) -> tuple[MlpState, torch.Tensor]:
    """Return what the backward needs, and y; O's product becomes h; `for_backward` leaves y out."""
    parts, workspace = call.parts, call.parts.workspace
    r_T, x_TE = _normed_input(x_TD, parts.norm2, parts.gate_up, workspace, addend_=o_TD)
    h_TD = o_TD
    gate_up_TG, u_gate_up_TR = parts.gate_up.forward(x_TE, call.dropouts[2])
    p_TE = parts.down.take_input("group_input", h_TD.shape[0], dtype=h_TD.dtype, device=h_TD.device)
    p_TF = swiglu(gate_up_TG, out_TF=p_TE[:, : parts.down.in_features])
    if for_backward:
        u_down_TR = parts.down.inner(p_TF, call.dropouts[3])
        return MlpState(h_TD, r_T, u_gate_up_TR, gate_up_TG, u_down_TR), h_TD
    y_TD, u_down_TR = parts.down.forward(p_TE, call.dropouts[3])
    return MlpState(h_TD, r_T, u_gate_up_TR, gate_up_TG, u_down_TR), y_TD.add_(h_TD)


def _mlp_backward(grad_y_TD: torch.Tensor, state: MlpState, call: BlockCall) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the gradient of h, and those of the adapters of gate, up and down."""
    parts, workspace = call.parts, call.parts.workspace
    gate_up_TG = state.gate_up_TG
    if gate_up_TG is None:
        _, x_TE = _normed_input(state.h_TD, parts.norm2, parts.gate_up, workspace)
        gate_up_TG = parts.gate_up.forward(x_TE, call.dropouts[2])[0]
    dropout = call.dropouts[3]
    grad_p_TF, grad_u_TR, adapter_TF = parts.down.backward_input(grad_y_TD, dropout, in_parts=True)
    d_TF = adapter_TF
    if d_TF is None:
        d_TF = workspace.take("product", tuple(grad_p_TF.shape), dtype=grad_p_TF.dtype, device=grad_p_TF.device)
    swiglu_backward_(gate_up_TG, grad_p_TF, product_TF=d_TF, grad_adapter_TF=adapter_TF, dropout=dropout.counter)
    dropout.drop_unless_done_(d_TF)
    down_grads = parts.down.backward_adapters(grad_y_TD, grad_u_TR, d_TF, state.u_down_TR)
    grad_h_TD, grads = _norm_backward(
        gate_up_TG, state.h_TD, state.r_T, state.u_gate_up_TR, grad_y_TD, call, norm=parts.norm2, index=2
    )
    return grad_h_TD, grads + down_grads


def _attention_backward(
    grad_h_TD: torch.Tensor, state: AttentionState, call: BlockCall, *, wanted: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Return the gradient of x, if it is wanted, and those of the adapters of q, k, v and o."""
    parts, workspace = call.parts, call.parts.workspace
    dropout = call.dropouts[1]
    grad_out_TA, grad_u_TR, _ = parts.o.backward_input(grad_h_TD, dropout, in_parts=False)
    d_TA = dropout.dropped(state.out_TA.detach(), workspace)
    o_grads = parts.o.backward_adapters(grad_h_TD, grad_u_TR, d_TA, state.u_o_TR)
    grads = torch.autograd.grad(state.out_TA, state.inputs, grad_out_TA.contiguous())
    grad_qkv_TF = _join_head_gradients(grads, state, call).flatten(1)
    if not wanted:
        grad_u_TR = parts.qkv.backward_inner(grad_qkv_TF, call.dropouts[0])
        qkv_grads = _norm_adapter_gradients(
            grad_qkv_TF, grad_u_TR, state.x_TD, state.r_T, state.u_qkv_TR, call, norm=parts.norm1, index=0
        )
        return None, qkv_grads + o_grads
    grad_x_TD, qkv_grads = _norm_backward(
        grad_qkv_TF, state.x_TD, state.r_T, state.u_qkv_TR, grad_h_TD, call, norm=parts.norm1, index=0
    )
    return grad_x_TD, qkv_grads + o_grads


def _join_head_gradients(grads_BNLH: tuple[torch.Tensor, ...], state: AttentionState, call: BlockCall) -> torch.Tensor:
    """Return the gradients of q, k and v in one matrix, (T, S, H), turned back and gone back through their norms."""
    parts = call.parts
    joined_TSH = torch.empty_like(state.qkv_TSH)
    num_heads = parts.query_heads + parts.key_heads
    ranges = (slice(0, parts.query_heads), slice(parts.query_heads, num_heads), slice(num_heads, None))
    for grad_BNLH, heads, rotates in zip(grads_BNLH, ranges, (parts.rotates, parts.rotates, False), strict=True):
        grad_BLNH, out_TNH = grad_BNLH.transpose(1, 2), joined_TSH[:, heads]
        if grad_BLNH.stride(3) != 1:
            grad_BLNH = grad_BLNH.contiguous()
        if rotates:
            rotate(grad_BLNH, call.cos_TH, call.sin_TH, out_TNH=out_TNH, backward=True)
        else:
            move_heads(grad_BLNH, out_TNH=out_TNH)
    if parts.q_norm is not None and parts.k_norm is not None:
        for heads, norm, r in zip(ranges[:2], (parts.q_norm, parts.k_norm), state.r_heads, strict=True):
            grad = joined_TSH[:, heads]
            rms_norm_backward(grad, state.qkv_TSH[:, heads], norm.weight_D, r, out=grad)
    return joined_TSH


def _norm_backward(
    grad_TF: torch.Tensor,
    x_TD: torch.Tensor,
    r_T: torch.Tensor,
    u_TR: torch.Tensor,
    residual_TD: torch.Tensor,
    call: BlockCall,
    *,
    norm: Norm,
    index: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Go back through the group that follows a norm, and the norm; `residual_TD` went past both."""
    group, dropout = call.parts.groups[index], call.dropouts[index]
    grad_n_TD, grad_u_TR, adapter_TD = group.backward_input(grad_TF, dropout, in_parts=True)
    grads = _norm_adapter_gradients(grad_TF, grad_u_TR, x_TD, r_T, u_TR, call, norm=norm, index=index)
    grad_x_TD = torch.empty_like(x_TD)
    rms_norm_backward(
        grad_n_TD,
        x_TD,
        norm.weight_D,
        r_T,
        out=grad_x_TD,
        residual=residual_TD,
        grad_adapter=adapter_TD,
        dropout=dropout.counter,
    )
    return grad_x_TD, grads


def _norm_adapter_gradients(
    grad_TF: torch.Tensor,
    grad_u_TR: torch.Tensor,
    x_TD: torch.Tensor,
    r_T: torch.Tensor,
    u_TR: torch.Tensor,
    call: BlockCall,
    *,
    norm: Norm,
    index: int,
) -> list[torch.Tensor]:
    """Return the gradients of the adapters of a group that follows a norm."""
    group, dropout, workspace = call.parts.groups[index], call.dropouts[index], call.parts.workspace
    if not group.rank:
        return []
    if not dropout.probability:
        scaled_TR = (grad_u_TR * r_T[:, None]).to(grad_u_TR.dtype)
        return group.backward_adapters(grad_TF, scaled_TR, x_TD, u_TR, weight_D=norm.weight_D)
    d_TD = workspace.take("group_input", tuple(x_TD.shape), dtype=x_TD.dtype, device=x_TD.device)
    rms_norm(x_TD, norm.weight_D, eps=norm.eps, out=d_TD, dropout=dropout.counter)
    return group.backward_adapters(grad_TF, grad_u_TR, dropout.drop_unless_done_(d_TD), u_TR)
