"""One new token through a decoder layer of the Llama family, with as few calls as it takes.

The library's layer spends more time on a token between its products than in them: a product of one row over a small
model's weight takes 100 us, and there are some seventy calls a layer. Here the norms are one call each, queries and
keys turn together, nothing is cast back and forth (the token stays in the dtype of the expanded weights from the
first layer to the last), and torch's attention is called directly.

What it computes is what the layer computes, over the library's own cache. Longer inputs, masks with rows of their own,
sliding windows and other attentions are the library's.

Shapes: B prompts, D width, N query heads, K key heads, S = N + K, H head width; one token each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional

from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear

ATTENTIONS = ("halfbyte", "sdpa")


@dataclasses.dataclass(slots=True)
class TokenState:
    """What the layers of a model share about the token at hand."""

    shell_dtype: torch.dtype = torch.float32
    """What the model around the layers computes in: the dtype in which the token came to the first of them."""
    source: torch.Tensor | None = None
    cos_B1H: torch.Tensor | None = None
    signed_sin_B1H: torch.Tensor | None = None

    def angles(self, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines for heads of one token, computed once a token."""
        if self.source is not cos or self.cos_B1H is None or self.signed_sin_B1H is None:
            half = sin.shape[-1] // 2
            sin = sin.to(dtype)
            self.source, self.cos_B1H = cos, cos.to(dtype)
            self.signed_sin_B1H = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        return self.cos_B1H, self.signed_sin_B1H


def can_decode(layer: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Say whether `decode_layer` computes this call."""
    attention = layer.self_attn
    return (
        hidden_states.shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and not layer.training
        and attention.config._attn_implementation in ATTENTIONS
        and getattr(attention, "sliding_window", None) is None
        and getattr(attention.config, "sliding_window", None) is None
        and (attention_mask is None or (attention_mask.ndim == 4 and attention_mask.dtype == torch.bool))
    )


def decode_layer(
    layer: Any,
    hidden_B1D: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    cache: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    token: TokenState,
) -> torch.Tensor:
    """Return the layer's output for one new token, and put its keys and values into the cache.

    Args:
        layer: A decoder layer whose parts are those that a fused block takes.
        hidden_B1D: (prompts, 1, width).
        attention_mask: Bool (prompts or 1, 1, 1, tokens), true where a query sees a key, or None.
        cache: transformers' cache.
        position_embeddings: Cosines and sines, (prompts or 1, 1, head width).
        token: Shared by the layers of a model.
    """
    attention, mlp = layer.self_attn, layer.mlp
    if attention.layer_idx == 0:
        token.shell_dtype = hidden_B1D.dtype
    x_B1D = hidden_B1D.to(_product_dtype(attention.q_proj, hidden_B1D))
    out_B1D = _attend(layer, _norm(x_B1D, layer.input_layernorm), attention_mask, cache, position_embeddings, token)
    x_B1D = x_B1D + multiply(attention.o_proj, out_B1D)
    n_B1D = _norm(x_B1D, layer.post_attention_layernorm)
    gate, up = multiply(mlp.gate_proj, n_B1D), multiply(mlp.up_proj, n_B1D)
    x_B1D = x_B1D + multiply(mlp.down_proj, functional.silu(gate).mul_(up))
    is_last = attention.layer_idx == attention.config.num_hidden_layers - 1
    return x_B1D.to(token.shell_dtype) if is_last else x_B1D


def multiply(projection: Any, x: torch.Tensor) -> torch.Tensor:
    """Call a projection, by the shortest way."""
    expanded = getattr(projection, "expanded", None)
    if expanded is not None:
        return expanded.multiply(x, with_adapter=getattr(projection, "adapter_enabled", False))
    return projection(x)


def _attend(
    layer: Any,
    n_B1D: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    token: TokenState,
) -> torch.Tensor:
    attention = layer.self_attn
    width, prompts = attention.head_dim, n_B1D.shape[0]
    q, k, v = (
        multiply(projection, n_B1D).view(prompts, -1, width)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if getattr(attention, "q_norm", None) is not None:
        q, k = _norm(q, attention.q_norm), _norm(k, attention.k_norm)
    num_query_heads = q.shape[1]
    heads_BSH = torch.cat([q, k], dim=1)
    if getattr(attention, "use_rope", True):
        cos_B1H, signed_sin_B1H = token.angles(*position_embeddings, heads_BSH.dtype)
        swapped_BSH = heads_BSH.roll(width // 2, dims=-1)
        heads_BSH = (heads_BSH * cos_B1H).addcmul_(swapped_BSH, signed_sin_B1H)
    q_BN1H, k_BK1H = heads_BSH[:, :num_query_heads, None], heads_BSH[:, num_query_heads:, None]
    keys, values = cache.update(k_BK1H, v[:, :, None], attention.layer_idx)
    out_BN1H = functional.scaled_dot_product_attention(
        q_BN1H,
        keys,
        values,
        attn_mask=mask,
        scale=attention.scaling,
        enable_gqa=keys.shape[1] != num_query_heads,
    )
    return out_BN1H.reshape(prompts, 1, -1)


def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    # For one token torch's own norm takes three times as long, in a dozen calls of its own.
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[-1])
    return (x * mean_square.add_(norm.variance_epsilon).rsqrt_()).mul_(norm.weight).to(x.dtype)


def _product_dtype(projection: Any, x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which products of one token run."""
    if isinstance(projection, (LoraLinear, Linear4bit)) and projection.expanded is not None:
        return projection.expanded.weight_FD.dtype
    return x.dtype
