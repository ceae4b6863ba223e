"""Which decoder layers of a model the fused block can take over, and how it does.

A layer fits if it is one of the classes below, whose forward was read and is tested against ours, and its parts are
what that class has by default: frozen RMS norms, SiLU, linear projections in 4 bits or plain with or without adapters.

The layer stays where it is, with its parameters, names and state dict: only its class becomes a subclass made here,
whose forward calls the block. What the block does not do goes to the library's own forward: whatever fills or reads a
cache, autocast, weights that are expanded for inference. Generation has decoders of its own.

`fuse_layers_` is chosen by the trainer where every layer fits; `unfuse_layers_` is the inverse.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halfbyte.memory.activation_offload import ActivationOffload
from halfbyte.memory.activation_policy import KeptNumbers, Policy
from halfbyte.models.cache_name import cache_name
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.nn.convert import workspace_of
from halfbyte.nn.decoder_block import decoder_block
from halfbyte.nn.decoder_block_parts import BlockParts, GradientSums, Norm
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.projection_group import ProjectionGroup, WeightOwner
from halfbyte.ops.counter_dropout import DropoutSeeds
from halfbyte.ops.workspace import Workspace

LAYER_CLASSES = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "SmolLM3DecoderLayer",
)
ATTENTION_PROJECTIONS, MLP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# One buffer for two weights that are never needed at once, see `halfbyte.nn.decoder_block`.
QKV_OR_DOWN = "qkv_or_down"
CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
SILU = {"silu", "swish"}
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The attribute of a layer whose frozen weights live in host memory, see `halfbyte.models.streaming`.
STREAMED = "halfbyte_streamed"


@dataclasses.dataclass(frozen=True, slots=True)
class FusionReport:
    """What became of a model's decoder layers; its text is for people."""

    num_fused: int
    reasons: dict[str, int]
    """Why layers do not fit, and how many."""

    def __str__(self) -> str:
        if not self.reasons:
            return f"fused blocks: all {self.num_fused} decoder layers"
        why = "; ".join(f"{reason} ({count} layers)" if count > 1 else reason for reason, count in self.reasons.items())
        return f"fused blocks: none, so training takes the path for any architecture, because {why}"


@dataclasses.dataclass(slots=True)
class _Binding:
    """What a fused layer carries beside the library's attributes."""

    workspace: Workspace
    owners: dict[str, WeightOwner]
    policy: Policy
    adapters_ride: bool
    seeds: DropoutSeeds
    offload: ActivationOffload
    sums: GradientSums
    fp8: bool = False
    modules: tuple[nn.Module, ...] = ()
    """Of which the parts were made."""
    parts: BlockParts | None = None


class FusedLayer:
    """The forward of a layer whose class `fuse_layers_` has changed; stands before the library's class."""

    halfbyte_binding: _Binding

    @property
    def shows_attention(self) -> bool:
        """Whether the configuration asks for the weights of attention."""
        layer: Any = self
        return bool(getattr(layer.self_attn.config, "output_attentions", False))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the layer as its class does; the arguments are transformers', of releases that differ."""
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache}
        cache = past_key_values if cache is None else cache
        parts = _current_parts(self) if cache is None and position_embeddings is not None else None
        # Weights of attention, where they are asked for, are what the library's attention returns.
        shows_weights = kwargs.get("output_attentions", self.shows_attention)
        if parts is None or shows_weights or _is_better_unfused(self, hidden_states):
            plain: Any = super()
            return plain.forward(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **{cache_name(_class_of(self)): cache},
                **kwargs,
            )
        layer: Any = self
        attention = layer.self_attn
        attend = functools.partial(_attend, attention, attention_mask=attention_mask, **kwargs)
        assert position_embeddings is not None
        cos_BLH, sin_BLH = position_embeddings
        return decoder_block(
            hidden_states,
            parts,
            cos_BLH=cos_BLH,
            sin_BLH=sin_BLH,
            attend=attend,
            policy=self.halfbyte_binding.policy,
            training=layer.training,
            seeds=self.halfbyte_binding.seeds,
        )


def fuse_layers_(
    model: PreTrainedModel, *, policy: Policy = "keep", adapters_ride: bool | None = None, fp8: bool = False
) -> FusionReport:
    """Let fused blocks compute the decoder layers of a model, if all of them fit.

    Args:
        model: Changed in place, its layers' classes only.
        policy: What every block keeps for its backward.
        adapters_ride: Whether adapters lie beside the weights in products; None is what is best on the device.
        fp8: Whether frozen weights are multiplied in fp8; on a CPU, for tests, in fp32 after rounding to it.

    Returns:
        How many layers were fused: all or none; and why not.
    """
    layers = list(iter_decoder_layers(model))
    reasons = collections.Counter(reason for layer in layers if (reason := why_not_fused(layer)) is not None)
    if not layers:
        reasons[f"{type(model).__name__} has no decoder layers that are known to fit"] = 1
    if reasons:
        return FusionReport(0, dict(reasons))
    # Of each card's buffers.
    owners: dict[torch.device, dict[str, WeightOwner]] = collections.defaultdict(dict)
    shared = (DropoutSeeds(), ActivationOffload(), GradientSums())
    if adapters_ride is None:
        adapters_ride = compute_device_of(model).type == "cuda"
    for layer in layers:
        if not isinstance(layer, FusedLayer):
            layer_class: Any = type(layer)
            layer.__class__ = _fused_class(layer_class)
        own = owners[_card_of(layer)]
        binding: Any = _Binding(workspace_of(model), own, policy, adapters_ride, *shared, fp8=fp8)
        object.__setattr__(layer, "halfbyte_binding", binding)
    return FusionReport(len(layers), {})


def unfuse_layers_(model: PreTrainedModel) -> None:
    """Give fused layers back the library's class."""
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            del layer.halfbyte_binding
            layer.__class__ = _class_of(layer)


def set_policy(model: PreTrainedModel, policy: Policy | Sequence[Policy]) -> None:
    """Choose what the fused blocks of a model keep for their backward: the same for all, or one for each in order."""
    layers = list(iter_fused_layers(model))
    policies = [policy] * len(layers) if isinstance(policy, str) else policy
    for layer, one in zip(layers, policies, strict=True):
        layer.halfbyte_binding.policy = one
    if layers:
        offload_of(model).release()


def dropout_seeds_of(model: PreTrainedModel) -> DropoutSeeds:
    """Return where the fused blocks of a model take the seeds of their dropouts."""
    return next(iter_fused_layers(model)).halfbyte_binding.seeds


def offload_of(model: PreTrainedModel) -> ActivationOffload:
    """Return where the fused blocks of a model put activations away."""
    return next(iter_fused_layers(model)).halfbyte_binding.offload


def gradient_sums_of(model: PreTrainedModel) -> GradientSums:
    """Return where the fused blocks of a model may add the gradients of their adapters."""
    return next(iter_fused_layers(model)).halfbyte_binding.sums


def iter_fused_layers(model: PreTrainedModel) -> Iterator[FusedLayer]:
    """Yield the layers that fused blocks compute."""
    return (layer for layer in model.modules() if isinstance(layer, FusedLayer))


def fused_layers_by_card(model: PreTrainedModel) -> dict[torch.device, list[int]]:
    """Return the numbers of the fused layers on each device, in order."""
    numbers: dict[torch.device, list[int]] = {}
    for number, layer in enumerate(iter_fused_layers(model)):
        numbers.setdefault(_card_of(layer), []).append(number)
    return numbers


def kept_bytes_per_token(model: PreTrainedModel, policy: Policy, *, itemsize: int) -> list[KeptNumbers]:
    """Return how many bytes of each token each fused block of a model keeps for its backward, in order."""
    parts = (_current_parts(layer) for layer in iter_fused_layers(model))
    kept = (part.sizes.kept_numbers(policy) for part in parts if part is not None)
    return [KeptNumbers(device=itemsize * numbers.device, host=itemsize * numbers.host) for numbers in kept]


def passing_bytes_per_token(model: PreTrainedModel, *, itemsize: int) -> int:
    """Return how many bytes of each token are alive while a fused block is computed, beside what blocks keep."""
    parts = (_current_parts(layer) for layer in iter_fused_layers(model))
    return itemsize * max((part.sizes.passing_numbers for part in parts if part is not None), default=0)


def has_fixed_angles(model: PreTrainedModel) -> bool:
    """Say whether the angles by which heads are turned depend on places alone, not on the length of what is read."""
    rotations = (module for module in model.modules() if hasattr(module, "rope_type"))
    return all(rotation.rope_type in FIXED_ROPE_TYPES for rotation in rotations)


def iter_decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of the classes that are known, and of those that look like a decoder layer."""
    for module in model.modules():
        if isinstance(module, FusedLayer) or type(module).__name__.endswith("DecoderLayer"):
            yield module


def why_not_fused(layer: nn.Module, *, takes_magnitudes: bool = False) -> str | None:
    """Return what keeps a layer from being fused, or None; `takes_magnitudes` for who can multiply by DoRA's."""
    name = _class_of(layer).__name__ if isinstance(layer, FusedLayer) else type(layer).__name__
    if name not in LAYER_CLASSES:
        return f"{name} is not among the known layers"
    children = {child for child, _ in layer.named_children()}
    if children != CHILDREN:
        return f"{name} has {', '.join(sorted(children ^ CHILDREN))} more or less than usual"
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    norms = _norms_of(layer)
    if any(norm.weight.requires_grad or not hasattr(norm, "variance_epsilon") for norm in norms):
        return f"a norm of {name} is trained, or is no RMS norm"
    if attention.config.hidden_act not in SILU:
        return f"the MLP's activation is {attention.config.hidden_act}, not SiLU"
    if attention.attention_dropout:
        return "attention weights are dropped in training, which computing a block again would not repeat"
    if not all(hasattr(mlp, child) for child in MLP_PROJECTIONS):
        return f"the MLP of {name} is a {type(mlp).__name__}"
    return _why_projections_do_not_fit(_projections_of(layer), takes_magnitudes=takes_magnitudes)


def _why_projections_do_not_fit(projections: tuple[nn.Module, ...], *, takes_magnitudes: bool) -> str | None:
    for projection in projections:
        if not isinstance(projection, (LoraLinear, Linear4bit, nn.Linear)):
            return f"a projection is a {type(projection).__name__}"
        adapter = projection.adapter() if isinstance(projection, LoraLinear) else {}
        if "lora_magnitude_vector" in adapter and not takes_magnitudes:
            return "its adapters have magnitudes (DoRA)"
        if any(p.requires_grad for n, p in projection.named_parameters() if n not in adapter):
            return "a projection is trained whole"
    for start, end in ((0, 3), (4, 6)):
        if len({p.dropout for p in projections[start:end] if isinstance(p, LoraLinear)}) > 1:
            return "adapters of one input have different dropouts"
    return None


def _projections_of(layer: Any) -> tuple[nn.Module, ...]:
    """Return q, k, v, o, gate, up and down."""
    attention = (getattr(layer.self_attn, name) for name in ATTENTION_PROJECTIONS)
    return (*attention, *(getattr(layer.mlp, name) for name in MLP_PROJECTIONS))


def _norms_of(layer: Any) -> tuple[Any, ...]:
    """Return both norms of a layer and, where it has them, those of queries and keys."""
    heads = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    return (layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in heads if norm is not None))


def _class_of(layer: FusedLayer) -> Any:
    """Return the library's class of a fused layer."""
    return type(layer).__mro__[2]


def _card_of(layer: Any) -> torch.device:
    device: torch.device = layer.input_layernorm.weight.device
    return device


def _current_parts(layer: Any) -> BlockParts | None:
    """Return the block's parts, made anew if a module was replaced since; None if the layer fits no more."""
    binding: _Binding = layer.halfbyte_binding
    modules = (*_projections_of(layer), *_norms_of(layer))
    if len(modules) != len(binding.modules) or any(a is not b for a, b in zip(modules, binding.modules, strict=True)):
        binding.modules = modules
        binding.parts = None if why_not_fused(layer) else _build_parts(layer, binding)
    return binding.parts


def _build_parts(layer: Any, binding: _Binding) -> BlockParts:
    projections: Any = _projections_of(layer)
    q, k, v, o, gate, up, down = projections
    norms = [Norm(module=norm, eps=norm.variance_epsilon) for norm in _norms_of(layer)]
    make = functools.partial(_make_group, binding=binding)
    head_width = layer.self_attn.head_dim
    return BlockParts(
        qkv=make(q, k, v, kind=QKV_OR_DOWN),
        o=make(o, kind="o"),
        gate_up=make(gate, up, kind="gate_up"),
        down=make(down, kind=QKV_OR_DOWN),
        norm1=norms[0],
        norm2=norms[1],
        q_norm=norms[2] if len(norms) == 4 else None,
        k_norm=norms[3] if len(norms) == 4 else None,
        query_heads=q.out_features // head_width,
        key_heads=k.out_features // head_width,
        head_width=head_width,
        rotates=bool(getattr(layer.self_attn, "use_rope", True)),
        workspace=binding.workspace,
        offload=binding.offload,
        sums=binding.sums,
        streamed=getattr(layer, STREAMED, None),
    )


def _make_group(*layers: Any, kind: str, binding: _Binding) -> ProjectionGroup:
    return ProjectionGroup(
        layers,
        kind=kind,
        workspace=binding.workspace,
        owners=binding.owners,
        adapters_ride=binding.adapters_ride,
        products="fp8" if binding.fp8 else "16bit",
    )


def _attend(
    attention: Any,
    query_BNLH: torch.Tensor,
    key_BKLH: torch.Tensor,
    value_BKLH: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Call the attention that the model is set to, as the library's layer does."""
    config = attention.config
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    if hasattr(attention, "sliding_window"):
        kwargs["sliding_window"] = attention.sliding_window
    elif type(attention).__name__ == "MistralAttention":
        kwargs["sliding_window"] = getattr(config, "sliding_window", None)
    out, _ = implementation(
        attention,
        query_BNLH,
        key_BKLH,
        value_BKLH,
        attention_mask,
        dropout=0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    return out


def _is_better_unfused(layer: Any, hidden_states: torch.Tensor) -> bool:
    """Say whether the library's forward is to compute this call."""
    if torch.is_autocast_enabled(hidden_states.device.type):
        return True
    return not torch.is_grad_enabled() and getattr(layer.self_attn.q_proj, "expanded", None) is not None


@functools.cache
def _fused_class(layer_class: Any) -> Any:
    return type(f"Fused{layer_class.__name__}", (FusedLayer, layer_class), {"__module__": __name__})
