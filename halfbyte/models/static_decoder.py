"""Decoding with nothing left for the host to decide: one step of one token a prompt, recorded once as a CUDA graph.

A token of a 7B model takes some five hundred kernels of a few microseconds, which is less than launching them costs.
So the step is made of operations whose addresses and shapes never change, and one launch replays them all:

    token -> embedding -> layers (fused_layers' families) -> norm -> head -> logits (-> the likeliest token)

The cache has fixed places for every token to come; how many of them each prompt has filled is a number on the device,
which the step itself increases. Prompts of a batch start at place 0 each: there is no padding and no mask. The prompt
goes through the library's layers, whose cache is copied.

The token that a step chose is the next one's input without leaving the device. The host reads it while the next step
runs already; if it was the last one, that step was for nothing, and nobody sees it.

Every operation has a reference in plain torch, so that the step runs without a graph, on a CPU too: for tests. What
the graph reads is held by this object or by the model. Scratch buffers of the model's workspace are not used, for they
move when they grow.

Kernels may overlap: each starts while those before it still run, loads weights, and waits for all of them to complete
before it reads what they wrote or writes anything itself. As every one waits, a kernel's end means the end of all
before it, and buffers may be used again as in a plain stream. What is read before waiting (weights, adapters, lengths,
keys of earlier tokens) was last written before the step's first operation, which is torch's and overlaps nothing.

Price: the cache for all tokens to come at once, the adapters once more in the dtype of the tokens, and some tenths of a
second for recording.

Shapes: B prompts, D width, K key heads, H head width, C capacity, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from halfbyte.models.decoder_state import token_dtype, weight_state
from halfbyte.models.fused_layers import FusedLayer, has_fixed_angles, iter_decoder_layers, why_not_fused
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.streaming import is_streamed
from halfbyte.nn.decode_group import DecodeGroup, kernel_fits, multiply_group
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.token_rows import frozen_original
from halfbyte.ops.decode_attention import Angles, HeadNorms, HeadOptions, decode_attention
from halfbyte.ops.decode_inner import gated_inner, normed_inner, plain_inner
from halfbyte.ops.matvec_4bit import DTYPES, MAX_TOKENS

SHELLS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")
MAX_HEAD_WIDTH = 256
CAPACITY_MULTIPLE = 256
OVERLAP_CAPABILITY = (9, 0)
# With more prompts, products take tensor cores, and overlapping costs more than it gives: on an H100 one prompt goes
# from 341 to 358 tokens/s with an adapter, four from 288 each to 261.
MAX_OVERLAPPING_PROMPTS = 1
Choose = Callable[[torch.Tensor], torch.Tensor]
"""Logits (B, V) in fp32 -> tokens (B)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """What the step needs of a decoder layer."""

    qkv: DecodeGroup
    o: DecodeGroup
    gate_up: DecodeGroup
    down: DecodeGroup
    norm1: Any
    norm2: Any
    heads: HeadOptions
    key_BKCH: torch.Tensor
    value_BKCH: torch.Tensor


def why_not_static(model: PreTrainedModel, num_prompts: int) -> str | None:
    """Return what keeps a model from being decoded here, or None."""
    layers = list(iter_decoder_layers(model))
    if type(model).__name__ not in SHELLS or not layers:
        return f"{type(model).__name__} is not among the known models"
    if not all(isinstance(layer, FusedLayer) and why_not_fused(layer) is None for layer in layers):
        return "its layers are not fused"
    embedding: Any = frozen_original(model.get_input_embeddings())
    device, dtype = compute_device_of(model), token_dtype(embedding)
    if model.training or torch.is_autocast_enabled(device.type) or dtype not in DTYPES:
        return "it is in train mode or under autocast, or computes in an unusual dtype"
    if is_streamed(model):
        return "weights of it live elsewhere than on its device"
    if any(p.device != device for p in model.parameters() if p is not embedding.weight):
        return "it lies on several devices"
    decoder: Any = model.model
    if not has_fixed_angles(model):
        return "its angles depend on the length"
    if any(layer.self_attn.head_dim > MAX_HEAD_WIDTH or layer.self_attn.head_dim % 2 for layer in decoder.layers):
        return f"its heads are odd, or wider than {MAX_HEAD_WIDTH}"
    if num_prompts > MAX_TOKENS:
        return f"there are more than {MAX_TOKENS} prompts"
    projections = (*(p for layer in decoder.layers for p in projections_of(layer)), model.lm_head)
    if device.type == "cuda" and not all(kernel_fits(p, num_prompts, dtype=dtype, device=device) for p in projections):
        return "a projection's 4-bit weight is not on the device, or has blocks that its kernel does not take"
    return None


def cache_nbytes(model: PreTrainedModel, num_prompts: int, num_tokens: int) -> int:
    """Return the bytes of the cache for so many tokens a prompt."""
    decoder: Any = model.model
    width = sum(layer.self_attn.k_proj.out_features for layer in decoder.layers)
    return 2 * width * num_prompts * round_capacity(num_tokens) * token_dtype(decoder.embed_tokens).itemsize


def round_capacity(num_tokens: int) -> int:
    """Return how many places a cache has for so many tokens: a little more, so that the next prompt may fit as well."""
    return -(-num_tokens // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


class StaticDecoder:
    """Decodes a few prompts at once."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_prompts: int,
        num_tokens: int,
        greedy: bool,
        backend: str = "auto",
        graph: bool | None = None,
        overlap: bool | None = None,
    ) -> None:
        """Prepare a model that `why_not_static` has nothing against, and record its step.

        Args:
            model: Its weights are used where they are.
            num_prompts: Decoded together.
            num_tokens: The most that a prompt and its answer may have.
            greedy: Whether the step chooses the likeliest token itself.
            backend: Of the operations.
            graph: Whether the step is recorded; None is where there is a CUDA device.
            overlap: Whether its kernels overlap, where the device can; None is where that is faster.
        """
        decoder: Any = model.model
        self.embed, self.final_norm, self.head = decoder.embed_tokens, decoder.norm, model.lm_head
        weight = frozen_original(self.embed).weight
        self.device, self.dtype = compute_device_of(model), token_dtype(self.embed)
        self.backend, self.greedy = backend, greedy
        overlap = num_prompts <= MAX_OVERLAPPING_PROMPTS if overlap is None else overlap
        self.overlap = overlap and can_overlap(self.device)
        self.num_prompts, self.capacity = num_prompts, round_capacity(num_tokens)
        self.weight_state = weight_state(model)
        # Of the first argument the library reads dtype and device.
        positions_1C = torch.arange(self.capacity, device=self.device)[None]
        cos_1CH, sin_1CH = decoder.rotary_emb(weight[:1].to(self.device, self.dtype), positions_1C)
        self.angles = Angles(cos_CH=cos_1CH[0].contiguous(), sin_CH=sin_1CH[0].contiguous())
        layers = decoder.layers[: decoder.config.num_hidden_layers]
        self.layers = [self._prepare(layer) for layer in layers]
        in_group = isinstance(self.head, (LoraLinear, Linear4bit))
        self.head_group = DecodeGroup((self.head,), self.dtype) if in_group else None
        self.no_A_RD = torch.empty(0, weight.shape[1], dtype=self.dtype, device=self.device)
        self.no_scale_R = torch.empty(0, dtype=torch.float32, device=self.device)
        self.token_B = torch.zeros(num_prompts, dtype=torch.long, device=self.device)
        self.length_B = torch.zeros(num_prompts, dtype=torch.int32, device=self.device)
        self.host_tokens = [
            torch.zeros(num_prompts, dtype=torch.long, pin_memory=self.device.type == "cuda") for _ in range(2)
        ]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV = torch.empty(0)
        if self.device.type == "cuda" if graph is None else graph:
            self.logits_BV = self._record()

    def serves(self, model: PreTrainedModel, *, num_prompts: int, num_tokens: int, greedy: bool) -> bool:
        """Say whether this decoder does for these prompts, with the weights as they are now."""
        return (
            self.num_prompts == num_prompts
            and self.capacity >= num_tokens
            and self.greedy == greedy
            and self.weight_state == weight_state(model)
        )

    @torch.no_grad()
    def fill(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """Take over what the library's cache holds of prompts of these lengths, padded on the left."""
        filled: Any
        for layer, filled in zip(self.layers, cache.layers, strict=True):
            for target, source in ((layer.key_BKCH, filled.keys), (layer.value_BKCH, filled.values)):
                # A sliding layer holds the last tokens only, and no token will ask for the others.
                present = source.shape[2]
                if all(length == lengths[0] for length in lengths):
                    kept = min(lengths[0], present)
                    target[:, :, lengths[0] - kept : lengths[0]] = source[:, :, present - kept :]
                    continue
                for row, length in enumerate(lengths):
                    kept = min(length, present)
                    target[row, :, length - kept : length] = source[row, :, present - kept :]
        self.length_B.copy_(torch.tensor(lengths, dtype=torch.int32))

    @torch.no_grad()
    def steps(self, first_B: torch.Tensor, num_steps: int, choose: Choose) -> Iterator[list[int]]:
        """Yield the tokens of every prompt, `first_B` first; `num_steps` in all.

        Args:
            first_B: Chosen from the prompts' own logits.
            num_steps: The cache has room for that many.
            choose: Chooses tokens where the step does not.
        """
        self.token_B.copy_(first_B)
        reading = self._send(0)
        for number in range(1, num_steps):
            self.advance(choose)
            upcoming = self._send(number)
            yield self._receive(reading)
            reading = upcoming
        yield self._receive(reading)

    @torch.no_grad()
    def advance(self, choose: Choose) -> None:
        """Do one step; nothing waits for it."""
        if self.graph is None:
            self.logits_BV = self._step()
        else:
            self.graph.replay()
        if not self.greedy:
            self.token_B.copy_(choose(self.logits_BV.float()))

    @property
    def cache_nbytes(self) -> int:
        return sum(layer.key_BKCH.nbytes + layer.value_BKCH.nbytes for layer in self.layers)

    def close(self) -> None:
        """Give the graph and its memory back."""
        if self.graph is not None:
            # Steps may be under way that nobody waited for.
            torch.cuda.synchronize(self.device)
            self.graph.reset()
            self.graph = None
        self.layers, self.logits_BV = [], torch.empty(0)

    def _record(self) -> torch.Tensor:
        """Record the step, and return the logits that it writes."""
        with torch.cuda.device(self.device):
            stream = _recording_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            # Kernels are compiled and loaded, tables made and cuBLAS woken before, none of which a graph may do.
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads go on using the device.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                return self._step()

    def _step(self) -> torch.Tensor:
        """Put the tokens at hand behind their prompts, and return the logits of what follows."""
        hidden_BD = self.embed(self.token_B)
        for layer in self.layers:
            hidden_BD = self._layer(layer, hidden_BD)
        group = self.head_group
        A_RD, scale_R = (self.no_A_RD, self.no_scale_R) if group is None else (group.A_RD, group.scale_R)
        n_BD, u_BR = self._normed(self.final_norm, hidden_BD, A_RD, scale_R)
        if group is None:
            logits_BV = self.head(n_BD)
        else:
            (logits_BV,) = multiply_group(group, n_BD, u_BR, overlap=self.overlap, backend=self.backend)
        if self.greedy:
            torch.argmax(logits_BV, -1, out=self.token_B)
        self.length_B += 1
        return logits_BV

    def _layer(self, layer: _Layer, hidden_BD: torch.Tensor) -> torch.Tensor:
        how: Any = {"overlap": self.overlap, "backend": self.backend}
        n_BD, u_BR = self._normed(layer.norm1, hidden_BD, layer.qkv.A_RD, layer.qkv.scale_R)
        q_BA, k_BF, v_BF = multiply_group(layer.qkv, n_BD, u_BR, **how)
        a_BA = decode_attention(
            q_BA,
            k_BF,
            v_BF,
            self.length_B,
            layer.key_BKCH,
            layer.value_BKCH,
            options=layer.heads,
            **how,
        )
        u_BR = plain_inner(a_BA, layer.o.A_RD, layer.o.scale_R, **how)
        (hidden_BD,) = multiply_group(layer.o, a_BA, u_BR, residual=hidden_BD, **how)
        n_BD, u_BR = self._normed(layer.norm2, hidden_BD, layer.gate_up.A_RD, layer.gate_up.scale_R)
        gate_BF, up_BF = multiply_group(layer.gate_up, n_BD, u_BR, **how)
        p_BF, u_BR = gated_inner(gate_BF, up_BF, layer.down.A_RD, layer.down.scale_R, **how)
        (hidden_BD,) = multiply_group(layer.down, p_BF, u_BR, residual=hidden_BD, **how)
        return hidden_BD

    def _normed(
        self, norm: Any, x_BD: torch.Tensor, A_RD: torch.Tensor, scale_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps = norm.variance_epsilon
        weight = norm.weight.detach()
        return normed_inner(x_BD, weight, A_RD, scale_R, eps=eps, overlap=self.overlap, backend=self.backend)

    def _prepare(self, layer: Any) -> _Layer:
        attention = layer.self_attn
        projections = projections_of(layer)
        groups = (DecodeGroup(projections[a:b], self.dtype) for a, b in ((0, 3), (3, 4), (4, 6), (6, 7)))
        qkv, o, gate_up, down = groups
        key_heads = attention.k_proj.out_features // attention.head_dim
        shape = (2, self.num_prompts, key_heads, self.capacity, attention.head_dim)
        cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return _Layer(
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
            norm1=layer.input_layernorm,
            norm2=layer.post_attention_layernorm,
            heads=HeadOptions(
                scale=attention.scaling,
                window=window_of(attention),
                norms=head_norms_of(attention),
                angles=self.angles if getattr(attention, "use_rope", True) else None,
            ),
            key_BKCH=cache[0],
            value_BKCH=cache[1],
        )

    def _send(self, number: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Have the chosen tokens copied to the host; of the two places that take turns, the other may be read."""
        host_B = self.host_tokens[number % 2]
        host_B.copy_(self.token_B, non_blocking=True)
        if self.device.type != "cuda":
            return host_B, None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return host_B, event

    def _receive(self, sent: tuple[torch.Tensor, torch.cuda.Event | None]) -> list[int]:
        host_B, event = sent
        if event is not None:
            event.synchronize()
        tokens: list[int] = host_B.tolist()
        return tokens


def can_overlap(device: torch.device) -> bool:
    """Say whether kernels can wait for others that still run."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAP_CAPABILITY


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device that steps are recorded on: cuBLAS keeps a buffer for each, for good."""
    return torch.cuda.Stream(device)


def projections_of(layer: Any) -> tuple[Any, ...]:
    """Return q, k, v, o, gate, up and down."""
    attention, mlp = layer.self_attn, layer.mlp
    names = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*names, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def head_norms_of(attention: Any) -> HeadNorms | None:
    """Return the norms of queries and keys, if there are any."""
    if getattr(attention, "q_norm", None) is None:
        return None
    q_norm, k_norm = attention.q_norm, attention.k_norm
    assert q_norm.variance_epsilon == k_norm.variance_epsilon
    return HeadNorms(q_weight_H=q_norm.weight.detach(), k_weight_H=k_norm.weight.detach(), eps=q_norm.variance_epsilon)


def window_of(attention: Any) -> int | None:
    """Return how many keys a token sees, or None for all."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    window: int | None = getattr(attention, "sliding_window", None)
    return window
