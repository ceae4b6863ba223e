"""The halves of a fused decoder block backward; see `decoder_block`."""

from __future__ import annotations

import torch

from halfbyte.nn.decoder_block_forward import normed_input
from halfbyte.nn.decoder_block_parts import AttentionState, BlockCall, HeadsState, MlpState, Norm
from halfbyte.ops.block_dropout import DROPPED_BUFFER
from halfbyte.ops.rms_norm import rms_norm, rms_norm_backward
from halfbyte.ops.rotary import move_heads, rotate
from halfbyte.ops.swiglu import swiglu_backward_

# B rows, L tokens a row, T = B L tokens, D width, N query heads, K key heads, S = N + 2 K heads in all, H head width


def mlp_backward(grad_y_TD: torch.Tensor, state: MlpState, call: BlockCall) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the gradient of h, and those of the adapters of gate, up and down."""
    parts, workspace = call.parts, call.parts.workspace
    gate_up_TG = state.gate_up_TG
    if gate_up_TG is None:
        _, x_TE = normed_input(state.h_TD, parts.norm2, parts.gate_up)
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


def attention_backward(
    grad_h_TD: torch.Tensor, state: AttentionState, call: BlockCall, *, wanted: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Return the gradient of x, if it is wanted, and those of the adapters of q, k, v and o."""
    parts, heads = call.parts, state.heads
    dropout = call.dropouts[1]
    grad_out_TA, grad_u_TR, _ = parts.o.backward_input(grad_h_TD, dropout, in_parts=False)
    d_TA = dropout.dropped(state.out_TA.detach(), parts.workspace)
    o_grads = parts.o.backward_adapters(grad_h_TD, grad_u_TR, d_TA, state.u_o_TR)
    grads = torch.autograd.grad(state.out_TA, heads.inputs, grad_out_TA.contiguous())
    grad_qkv_TF = _join_head_gradients(grads, heads, call).flatten(1)
    del grads
    if not wanted:
        grad_u_TR = parts.qkv.backward_inner(grad_qkv_TF, call.dropouts[0])
        qkv_grads = _norm_adapter_gradients(
            grad_qkv_TF, grad_u_TR, heads.x_TD, heads.r_T, heads.u_qkv_TR, call, norm=parts.norm1, index=0
        )
        return None, qkv_grads + o_grads
    grad_x_TD, qkv_grads = _norm_backward(
        grad_qkv_TF, heads.x_TD, heads.r_T, heads.u_qkv_TR, grad_h_TD, call, norm=parts.norm1, index=0
    )
    return grad_x_TD, qkv_grads + o_grads


def _join_head_gradients(grads_BNLH: tuple[torch.Tensor, ...], state: HeadsState, call: BlockCall) -> torch.Tensor:
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
    d_TD = workspace.take(DROPPED_BUFFER, tuple(x_TD.shape), dtype=x_TD.dtype, device=x_TD.device)
    rms_norm(x_TD, norm.weight_D, eps=norm.eps, out=d_TD, dropout=dropout.counter)
    return group.backward_adapters(grad_TF, grad_u_TR, dropout.drop_unless_done_(d_TD), u_TR)
