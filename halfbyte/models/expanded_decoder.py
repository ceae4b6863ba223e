"""Decoding on a CPU: weights expanded once, and as few calls a token as it takes.

One token reads every weight once, so that expanding them for each token would cost more than the products. Here each
layer of the fused families becomes four matrices in fp32, which a CPU multiplies with one row fastest, and whatever is
linear is folded into them:

    [Q K V] = diag(n1) (W + s B A)'     [Gate Up] = diag(n2) (W + s B A)'     O, Down = (W + s B A)'

W restored from 4 bits, s B A the adapter, n the weight of the norm; with DoRA rows have its lengths. All of it is exact
but for roundings of fp32, which are far below those of the 16-bit products that a GPU would use. Matrices lie (in,
out), the order in which a row times a matrix reads memory from front to back. What is left of a norm is one number a
token, and it rides as the product's factor. A layer is then some fifteen calls, four of them products.

Keys and values have fixed places, prompts of a batch start at place 0 each, and there is no padding. A prompt goes
through the same code as a token, one prompt at a time.

Price: 4 bytes a weight while it lives, which is not for models that do not fit so.

Shapes: B prompts, T tokens of one prompt or one token of each, D width, S = N + 2 K heads of queries, keys and values,
H head width, C capacity, F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from halfbyte.models.decoder_state import token_dtype, weight_state
from halfbyte.models.fused_layers import has_fixed_angles, iter_decoder_layers, why_not_fused
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.static_decoder import (
    SHELLS,
    Choose,
    head_norms_of,
    projections_of,
    window_of,
)
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.token_rows import frozen_original
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.workspace import Workspace

CAPACITY_MULTIPLE = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Product:
    """A matrix with everything linear folded in."""

    weight_DF: torch.Tensor
    bias_F: torch.Tensor
    """One zero where there is none."""
    has_bias: bool

    def __call__(self, x_TD: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
        """Return factor x W + bias."""
        return torch.addmm(self.bias_F, x_TD, self.weight_DF, beta=int(self.has_bias), alpha=factor)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    qkv: _Product
    o: _Product
    gate_up: _Product
    down: _Product
    eps: tuple[float, float]
    """Of both norms."""
    head_norms: tuple[torch.Tensor, float] | None
    """Weights of queries' and keys' norms, (N + K, H), and eps."""
    rotates: bool
    scale: float
    window: int | None
    key_BKCH: torch.Tensor
    value_BKCH: torch.Tensor


class ExpandedDecoder:
    """Decodes a few prompts at once.

    Args:
        model: Of one of the fused families, on a CPU, in eval mode; its adapters as they are now.
        num_prompts: Decoded together.
        num_tokens: The most that a prompt and its answer may have.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, *, num_prompts: int, num_tokens: int) -> None:
        decoder: Any = model.model
        self.embed, self.final_norm, self.head = decoder.embed_tokens, decoder.norm, model.lm_head
        self.num_prompts = num_prompts
        self.capacity = -(-num_tokens // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self.weight_state = weight_state(model)
        cos_1CH, sin_1CH = decoder.rotary_emb(torch.zeros(1, 1), torch.arange(self.capacity)[None])
        half = sin_1CH.shape[-1] // 2
        self.cos_CH = cos_1CH[0].contiguous()
        self.signed_sin_CH = torch.cat([-sin_1CH[0, :, :half], sin_1CH[0, :, half:]], dim=-1).contiguous()
        workspace = Workspace()
        self.layers = [self._prepare(layer, workspace) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
        self.lengths = [0] * num_prompts
        self.zero = torch.zeros(1, 1, 1)

    def serves(self, model: PreTrainedModel, *, num_prompts: int, num_tokens: int) -> bool:
        """Say whether this decoder does for these prompts, with the weights as they are now."""
        fits = self.num_prompts == num_prompts and self.capacity >= num_tokens
        return fits and self.weight_state == weight_state(model)

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts, and return the logits of what follows, (B, V) in fp32."""
        last = []
        for row, ids in enumerate(prompts):
            self.lengths[row] = 0
            x_TD = self._embedded(torch.tensor(ids))
            for layer in self.layers:
                x_TD = self._forward(layer, x_TD, row)
            self.lengths[row] = len(ids)
            last.append(x_TD[-1:])
        return self._logits(torch.cat(last))

    @torch.no_grad()
    def steps(self, first_B: torch.Tensor, num_steps: int, choose: Choose) -> Iterator[list[int]]:
        """Yield the tokens of every prompt, `first_B` first; `num_steps` in all.

        Args:
            first_B: Chosen from the prompts' own logits.
            num_steps: The cache has room for that many.
            choose: Chooses tokens from logits.
        """
        chosen_B = first_B
        yield chosen_B.tolist()
        for _ in range(1, num_steps):
            chosen_B = choose(self.advance(chosen_B))
            yield chosen_B.tolist()

    @torch.no_grad()
    def advance(self, token_B: torch.Tensor) -> torch.Tensor:
        """Put one token behind each prompt, and return the logits of what follows, (B, V) in fp32."""
        x_BD = self._embedded(token_B)
        for layer in self.layers:
            x_BD = self._forward(layer, x_BD, None)
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits(x_BD)

    def close(self) -> None:
        """Give the memory back."""
        self.layers = []

    def _embedded(self, token_T: torch.Tensor) -> torch.Tensor:
        x_TD: torch.Tensor = self.embed(token_T)
        return x_TD.float()

    def _logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        norm = self.final_norm
        n_BD = functional.rms_norm(x_BD, x_BD.shape[1:], norm.weight.float(), norm.variance_epsilon)
        logits_BV: torch.Tensor = self.head(n_BD.to(token_dtype(self.embed)))
        return logits_BV.float()

    def _forward(self, layer: _Layer, x_TD: torch.Tensor, row: int | None) -> torch.Tensor:
        """Return a layer's output for the tokens of one prompt, `row`, or for one more token of every prompt."""
        qkv_TF = _normed_product(x_TD, layer.qkv, layer.eps[0])
        width = layer.key_BKCH.shape[3]
        a_TA = self._attend(layer, qkv_TF.view(x_TD.shape[0], -1, width), row)
        x_TD = _add_product(x_TD, a_TA, layer.o)
        gate_TF, up_TF = _normed_product(x_TD, layer.gate_up, layer.eps[1]).chunk(2, dim=1)
        return _add_product(x_TD, functional.silu(gate_TF).mul_(up_TF), layer.down)

    def _attend(self, layer: _Layer, qkv_TSH: torch.Tensor, row: int | None) -> torch.Tensor:
        num_tokens, num_heads, width = qkv_TSH.shape
        key_heads = layer.key_BKCH.shape[1]
        turning = num_heads - key_heads
        qk_TSH = qkv_TSH[:, :turning]
        if layer.head_norms is not None:
            weight_SH, eps = layer.head_norms
            qk_TSH = functional.rms_norm(qk_TSH, (width,), None, eps) * weight_SH
        if layer.rotates:
            qk_TSH = self._rotate(qk_TSH, row)
        q_TNH, k_TKH, v_TKH = qk_TSH[:, : turning - key_heads], qk_TSH[:, turning - key_heads :], qkv_TSH[:, turning:]
        if row is not None:
            layer.key_BKCH[row, :, :num_tokens] = k_TKH.transpose(0, 1)
            layer.value_BKCH[row, :, :num_tokens] = v_TKH.transpose(0, 1)
            return _attend_prompt(layer, q_TNH, k_TKH, v_TKH)
        for index, length in enumerate(self.lengths):
            layer.key_BKCH[index, :, length] = k_TKH[index]
            layer.value_BKCH[index, :, length] = v_TKH[index]
        rows = [self._attend_token(layer, q_TNH[index], index) for index in range(num_tokens)]
        return rows[0] if num_tokens == 1 else torch.cat(rows)

    def _rotate(self, heads_TSH: torch.Tensor, row: int | None) -> torch.Tensor:
        if row is not None:
            cos_TH, sin_TH = self.cos_CH[: len(heads_TSH)], self.signed_sin_CH[: len(heads_TSH)]
        elif self.num_prompts == 1:
            place = self.lengths[0]
            cos_TH, sin_TH = self.cos_CH[place], self.signed_sin_CH[place]
        else:
            cos_TH, sin_TH = self.cos_CH[self.lengths], self.signed_sin_CH[self.lengths]
        if cos_TH.ndim == 2:
            cos_TH, sin_TH = cos_TH[:, None], sin_TH[:, None]
        return (heads_TSH * cos_TH).addcmul_(heads_TSH.roll(heads_TSH.shape[2] // 2, dims=2), sin_TH)

    def _attend_token(self, layer: _Layer, q_NH: torch.Tensor, index: int) -> torch.Tensor:
        """Return what one token sees, (1, N H)."""
        end = self.lengths[index] + 1
        start = 0 if layer.window is None else max(0, end - layer.window)
        keys_KCH, values_KCH = layer.key_BKCH[index, :, start:end], layer.value_BKCH[index, :, start:end]
        q_KGH = q_NH.view(keys_KCH.shape[0], -1, q_NH.shape[1])
        scores_KGC = torch.baddbmm(self.zero, q_KGH, keys_KCH.transpose(1, 2), beta=0, alpha=layer.scale)
        return torch.bmm(scores_KGC.softmax(-1), values_KCH).view(1, -1)

    def _prepare(self, layer: Any, workspace: Workspace) -> _Layer:
        attention = layer.self_attn
        q, k, v, o, gate, up, down = projections_of(layer)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        key_heads = k.out_features // attention.head_dim
        cache = torch.zeros(2, self.num_prompts, key_heads, self.capacity, attention.head_dim)
        head_norms, stacked = head_norms_of(attention), None
        if head_norms is not None:
            query_heads = q.out_features // attention.head_dim
            weights = [head_norms.q_weight_H.expand(query_heads, -1), head_norms.k_weight_H.expand(key_heads, -1)]
            stacked = torch.cat(weights).float(), head_norms.eps
        return _Layer(
            qkv=_fold((q, k, v), workspace, norms[0].weight),
            o=_fold((o,), workspace),
            gate_up=_fold((gate, up), workspace, norms[1].weight),
            down=_fold((down,), workspace),
            eps=(norms[0].variance_epsilon, norms[1].variance_epsilon),
            head_norms=stacked,
            rotates=bool(getattr(attention, "use_rope", True)),
            scale=attention.scaling,
            window=window_of(attention),
            key_BKCH=cache[0],
            value_BKCH=cache[1],
        )


def why_not_expanded(model: PreTrainedModel) -> str | None:
    """Return what keeps a model from being decoded here, or None."""
    layers = list(iter_decoder_layers(model))
    if type(model).__name__ not in SHELLS or not layers:
        return f"{type(model).__name__} is not among the known models"
    if any(why_not_fused(layer, takes_magnitudes=True) is not None for layer in layers):
        return "its layers are not what fused blocks compute"
    weight: Any = frozen_original(model.get_input_embeddings()).weight
    if compute_device_of(model).type != "cpu" or weight.itemsize > 4:
        return "it is not on a CPU, or computes in fp64"
    if model.training or torch.is_autocast_enabled("cpu"):
        return "it is in train mode or under autocast"
    if not has_fixed_angles(model):
        return "its angles depend on the length"
    return None


def _normed_product(x_TD: torch.Tensor, product: _Product, eps: float) -> torch.Tensor:
    """Return the product of x over its root mean square."""
    if x_TD.shape[0] == 1:
        row_D = x_TD[0]
        return product(x_TD, factor=1 / math.sqrt(torch.dot(row_D, row_D).item() / row_D.shape[0] + eps))
    return product(functional.rms_norm(x_TD, x_TD.shape[1:], None, eps))


def _add_product(x_TD: torch.Tensor, y_TF: torch.Tensor, product: _Product) -> torch.Tensor:
    """Return x plus a product."""
    if product.has_bias:
        x_TD = x_TD + product.bias_F
    return torch.addmm(x_TD, y_TF, product.weight_DF)


def _attend_prompt(layer: _Layer, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
    num_tokens = q_TNH.shape[0]
    q, k, v = (t.transpose(0, 1)[None] for t in (q_TNH, k_TKH, v_TKH))
    mask = None
    if layer.window is not None and num_tokens > layer.window:
        place = torch.arange(num_tokens)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < layer.window)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and num_tokens > 1, scale=layer.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).flatten(1)


def _fold(projections: Sequence[Any], workspace: Workspace, norm_D: torch.Tensor | None = None) -> _Product:
    """Return projections of one input side by side, with their adapters and the norm before them folded in."""
    width, out_features = projections[0].in_features, sum(p.out_features for p in projections)
    weight_DF = torch.empty(width, out_features)
    start = 0
    for projection in projections:
        base = projection.base if isinstance(projection, LoraLinear) else projection
        if isinstance(base, Linear4bit):
            part_FD = dequantize_4bit(base.quantized, dtype=torch.float32, workspace=workspace)
        else:
            part_FD = base.weight.detach().float()
        if isinstance(projection, LoraLinear) and projection.acting is not None:
            A_RD, B_FR = (factor.detach().float() for factor in projection.acting)
            part_FD = torch.addmm(part_FD, B_FR, A_RD, alpha=projection.scaling)
            if projection.lora_magnitude_vector is not None:
                # The lengths are those of the sum, whatever made it.
                lengths_F1 = torch.linalg.vector_norm(part_FD, dim=1, keepdim=True)
                part_FD *= projection.lora_magnitude_vector.detach().float()[:, None] / lengths_F1
        if norm_D is not None:
            part_FD = part_FD * norm_D.float()
        weight_DF[:, start : start + part_FD.shape[0]] = part_FD.T
        start += part_FD.shape[0]
    biases = [p.bias for p in projections]
    if all(bias is None for bias in biases):
        return _Product(weight_DF=weight_DF, bias_F=torch.zeros(1), has_bias=False)
    filled = [torch.zeros(p.out_features) if p.bias is None else p.bias.detach().float() for p in projections]
    return _Product(weight_DF=weight_DF, bias_F=torch.cat(filled), has_bias=True)
