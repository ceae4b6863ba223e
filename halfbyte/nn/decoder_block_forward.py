"""The halves of a fused decoder block, forward and computed again; see `decoder_block`."""

from __future__ import annotations

import torch

from halfbyte.nn.decoder_block_parts import AttentionState, BlockCall, HeadsState, MlpState, Norm
from halfbyte.nn.projection_group import ProjectionGroup
from halfbyte.ops.rms_norm import rms_norm
from halfbyte.ops.rotary import move_heads, rotate_
from halfbyte.ops.swiglu import swiglu

# B rows, L tokens a row, T = B L tokens, D width, N query heads, K key heads, S = N + 2 K heads in all, H head width

# The group's gradient of its input goes to the same memory: in a backward, a group's input is used up before.
INPUT_BUFFER = "group_grad"


def normed_input(
    x_TD: torch.Tensor, norm: Norm, group: ProjectionGroup, *, addend_: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return r, and the norm of x, to which `addend_` is added in place, in the buffer of a group's input."""
    x_TE = group.take_input(INPUT_BUFFER, x_TD.shape[0], dtype=x_TD.dtype, device=x_TD.device)
    n_TD = x_TE[:, : x_TD.shape[1]]
    return rms_norm(x_TD, norm.weight_D, eps=norm.eps, out=n_TD, addend_=addend_), x_TE


def project_heads(x_TD: torch.Tensor, call: BlockCall) -> HeadsState:
    """Return what attention is to be called with."""
    parts = call.parts
    r_T, x_TE = normed_input(x_TD, parts.norm1, parts.qkv)
    qkv_TF, u_qkv_TR = parts.qkv.forward(x_TE, call.dropouts[0])
    qkv_TSH = qkv_TF.view(x_TD.shape[0], -1, parts.head_width)
    return place_heads(x_TD, r_T, u_qkv_TR, qkv_TSH, call, is_rotated=False)


def place_heads(
    x_TD: torch.Tensor,
    r_T: torch.Tensor,
    u_qkv_TR: torch.Tensor,
    qkv_TSH: torch.Tensor,
    call: BlockCall,
    *,
    is_rotated: bool,
) -> HeadsState:
    """Rotate queries and keys, and return what attention is to be called with.

    Args:
        x_TD: Input of the block.
        r_T: Of its norm.
        u_qkv_TR: Of the product.
        qkv_TSH: The product; queries and keys stay as they are where they are normed, and are rotated in place else.
        call: The call.
        is_rotated: Whether they were rotated in place already.
    """
    parts = call.parts
    num_heads = parts.query_heads + parts.key_heads
    turned_TSH = qkv_TSH[:, :num_heads]
    r_heads: tuple[torch.Tensor, ...] = ()
    if parts.q_norm is not None and parts.k_norm is not None:
        turned_TSH = torch.empty_like(turned_TSH, memory_format=torch.contiguous_format)
        ranges = (slice(0, parts.query_heads), slice(parts.query_heads, num_heads))
        r_heads = tuple(
            rms_norm(qkv_TSH[:, heads], norm.weight_D, eps=norm.eps, out=turned_TSH[:, heads])
            for heads, norm in zip(ranges, (parts.q_norm, parts.k_norm), strict=True)
        )
        is_rotated = False
    if parts.rotates and not is_rotated:
        rotate_(turned_TSH, call.cos_TH, call.sin_TH)
    q, k = turned_TSH[:, : parts.query_heads], turned_TSH[:, parts.query_heads :]
    leaves = (t.unflatten(0, (call.rows, -1)).transpose(1, 2).detach() for t in (q, k, qkv_TSH[:, num_heads:]))
    inputs = tuple(leaf.requires_grad_() for leaf in leaves)
    return HeadsState(x_TD, r_T, u_qkv_TR, qkv_TSH, r_heads, inputs)


def attention_forward(heads: HeadsState, call: BlockCall, *, record: bool) -> tuple[AttentionState, torch.Tensor]:
    """Return what the backward needs, and O's product; `record` says whether there will be a backward of this pass."""
    parts, x_TD = call.parts, heads.x_TD
    with torch.set_grad_enabled(record):
        query, key, value = heads.inputs
        out_BLNH = call.attend(query, key, value)
        out_TA = out_BLNH.reshape(x_TD.shape[0], -1)
    a_TE = parts.o.take_input(INPUT_BUFFER, out_TA.shape[0], dtype=out_TA.dtype, device=out_TA.device)
    a_TNH = a_TE[:, : out_TA.shape[1]].unflatten(1, (-1, parts.head_width))
    move_heads(out_BLNH.detach(), out_TNH=a_TNH)
    o_TD, u_o_TR = parts.o.forward(a_TE, call.dropouts[1])
    return AttentionState(heads, out_TA, u_o_TR), o_TD


def mlp_forward(x_TD: torch.Tensor, o_TD: torch.Tensor, call: BlockCall) -> tuple[MlpState, torch.Tensor]:
    """Return what the backward needs, and y; O's product becomes h."""
    parts = call.parts
    r_T, x_TE = normed_input(x_TD, parts.norm2, parts.gate_up, addend_=o_TD)
    h_TD = o_TD
    gate_up_TG, u_gate_up_TR = parts.gate_up.forward(x_TE, call.dropouts[2])
    p_TE = parts.down.take_input(INPUT_BUFFER, h_TD.shape[0], dtype=h_TD.dtype, device=h_TD.device)
    swiglu(gate_up_TG, out_TF=p_TE[:, : parts.down.in_features])
    y_TD, u_down_TR = parts.down.forward(p_TE, call.dropouts[3])
    return MlpState(h_TD, r_T, u_gate_up_TR, gate_up_TG, u_down_TR), y_TD.add_(h_TD)


def mlp_again(x_TD: torch.Tensor, o_TD: torch.Tensor, u_down_TR: torch.Tensor, call: BlockCall) -> MlpState:
    """Return what `mlp_forward` returned, as far as it has to be computed again; O's product becomes h."""
    parts = call.parts
    r_T, x_TE = normed_input(x_TD, parts.norm2, parts.gate_up, addend_=o_TD)
    gate_up_TG, u_gate_up_TR = parts.gate_up.forward(x_TE, call.dropouts[2])
    return MlpState(o_TD, r_T, u_gate_up_TR, gate_up_TG, u_down_TR)
