"""A decoder block of the Llama family with a hand-written backward.

    h = x + O(attention(rotate(Q n1), rotate(K n1), V n1))      n1 = norm(x)
    y = h + Down(silu(Gate n2) * Up n2)                         n2 = norm(h)

Q, K, V, O, Gate, Up, Down are frozen projections with adapters, see `projection_group`. What is kept for the backward
is a policy of each block; the gradients are the same bits under all:

    keep        x, h, the products q k v and gate up, attention's own, and what is narrow: (6 D + 2 F) numbers a token
    mlp         without gate up, which is multiplied again from h
    offload     x and q k v, 4 D numbers a token, in host memory; attention, O, gate up are computed again
    block       x alone; the block is computed again, but for the product of Down

Norm outputs and the gated product are never kept: computing them again costs one pass over memory. Without dropout
the adapters of q, k, v, gate and up do not even ask for that: n = r w x, so  grad_A = g' n = ((r g)' x) w. What is as
narrow as a rank or a single number a token is kept under every policy, where it spares a pass.

Attention is not ours: what is called for q, k and v records its own graph, which the backward asks for gradients.

What the device holds, in MiB, for a 7B model with rank 16 under "offload", 4 x 1024 tokens in bf16:

    frozen weights in NF4 with double quantisation      3186
    embedding, head                                      500
    adapters in fp32, sums of their gradients            305    (moments of the optimizer: 76, or in host memory)
    A of the adapters in bf16                             35
    expanded weights: gate up, q k v or down, o          302
    a group's input or its gradient, both F wide          172    (the adapter's share of the gradient is the second)
    dropped input                                         32
    x and q k v of two blocks                            256
    gate up, h, attention's output, gradients of h and y 300
    narrow                                                20

That makes 5108, and 64 to 128 for cuBLAS. While the loss is computed, what blocks need is not there but for x and q k v
of the last, and a chunk of logits takes 125. Down shares the buffer of its weight with q k v: each of them is expanded
once in a backward but under "block", where 100 MB are expanded twice, half a percent of a step.

Price: no second derivative, and weights of norms get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from halfbyte.memory.activation_policy import Policy
from halfbyte.nn.decoder_block_backward import attention_backward, mlp_backward
from halfbyte.nn.decoder_block_forward import attention_forward, mlp_again, mlp_forward, place_heads, project_heads
from halfbyte.nn.decoder_block_parts import Attend, AttentionState, BlockCall, BlockParts, MlpState
from halfbyte.ops.block_dropout import draw_block_dropout
from halfbyte.ops.counter_dropout import DropoutSeeds

# B rows, L tokens a row, T = B L tokens, D width, H head width, F feed-forward width, R rank


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
    parts.arrive(backward=False)
    parameters = parts.parameters
    if torch.is_grad_enabled() and (x_BLD.requires_grad or any(p.requires_grad for p in parameters)):
        y_TD = _DecoderBlock.apply(x_TD, call, *parameters)
    else:
        o_TD = attention_forward(project_heads(x_TD, call), call, record=False)[1]
        y_TD = mlp_forward(x_TD, o_TD, call)[1]
    return y_TD.view(x_BLD.shape)


class _DecoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, call: BlockCall, *parameters: torch.Tensor) -> torch.Tensor:
        policy, offload = call.policy, call.parts.offload
        keeps = policy in ("keep", "mlp")
        heads = project_heads(x_TD, call)
        ctx.offloaded = None
        if policy == "offload":
            ctx.offloaded = offload.put(x_TD, heads.qkv_TSH), heads.r_T, heads.u_qkv_TR
        attention, o_TD = attention_forward(heads, call, record=keeps)
        kept = attention if keeps else None
        # What is not kept is freed before the widest tensors come.
        del heads, attention
        mlp, y_TD = mlp_forward(x_TD, o_TD, call)
        if policy != "keep":
            mlp.gate_up_TG = None
        ctx.call, ctx.u_down_TR = call, mlp.u_down_TR
        ctx.states = None if kept is None else (kept, mlp)
        # Adapters only to notice one that is changed in place before the backward.
        ctx.save_for_backward(*parameters, *(() if policy == "offload" else (x_TD,)))
        offload.make_room()
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: torch.Tensor) -> tuple[Any, ...]:
        call, saved, parameters = ctx.call, ctx.saved_tensors, ctx.call.parts.parameters
        call.parts.arrive(backward=True)
        for group in call.parts.groups:
            group.forget_weight()
        # None by policy, or because this is not the first backward of a graph that was retained.
        states, ctx.states = ctx.states, None
        attention, mlp = states or _compute_again(ctx, call, x_TD=None if ctx.offloaded else saved[-1])
        del states
        grad_h_TD, mlp_grads = mlp_backward(grad_y_TD.contiguous(), mlp, call)
        del mlp
        grad_x_TD, attention_grads = attention_backward(grad_h_TD, attention, call, wanted=ctx.needs_input_grad[0])
        grads = call.parts.sums.add(parameters, [*attention_grads, *mlp_grads])
        return grad_x_TD, None, *grads


def _compute_again(ctx: Any, call: BlockCall, *, x_TD: torch.Tensor | None) -> tuple[AttentionState, MlpState]:
    """Return what both halves need for their backward, from x or, if that is None, from what was put away."""
    if x_TD is None:
        offloaded, r_T, u_qkv_TR = ctx.offloaded
        x_TD, qkv_TSH = call.parts.offload.get(offloaded)
        heads = place_heads(x_TD, r_T, u_qkv_TR, qkv_TSH, call, is_rotated=True)
    else:
        heads = project_heads(x_TD, call)
    attention, o_TD = attention_forward(heads, call, record=True)
    return attention, mlp_again(x_TD, o_TD, ctx.u_down_TR, call)
