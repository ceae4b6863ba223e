"""Load a model: built without weights, then filled tensor by tensor, linear layers quantised as they arrive.

    config -> model on the meta device -> for each parameter: read, quantise or keep, put in place -> the rest computed

At no time does more than one weight exist in 16 bits on the CPU, apart from those that stay so: the files are mapped,
not read into memory. On the way to a GPU, weights pass through a small pinned ring (see `staging`) and are quantised on
the device.

In 4 bits: every `nn.Linear` but the output head and those that the checkpoint's quantisation config leaves out.
In 16 bits: all else, in the compute dtype, except that embedding and head keep 16 bits where products run in fp32.
Weights that a checkpoint holds in bitsandbytes' 4-bit form are taken as they are, byte for byte.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.device import resolve_compute_dtype, resolve_device
from halfbyte.errors import ConfigError, FormatError
from halfbyte.models.build import build_meta_model, init_computed_buffers_
from halfbyte.models.card_split import CardSplit, pass_along_, split_over_cards
from halfbyte.models.describe import load_config, load_tokenizer
from halfbyte.models.fill import ModelFiller, fill_
from halfbyte.models.half_storage import HalfEmbedding, HalfHead
from halfbyte.models.host_embedding import host_embedding_
from halfbyte.models.placement import Placement, make_placements
from halfbyte.models.report import LoadReport, make_load_report
from halfbyte.models.source import ModelSource, resolve_source
from halfbyte.models.streaming import ON_DEVICE, Residency, SlabFiller
from halfbyte.models.weight_splits import WeightSplits
from halfbyte.models.weights import iter_weights
from halfbyte.nn.convert import workspace_of
from halfbyte.nn.split import Split
from halfbyte.quant import QuantSpec

# A stacked tensor above this share of the model is not left in 16 bits without being asked.
LARGE_SHARE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for use, frozen."""

    model: PreTrainedModel
    """A transformers model of its own class. Its `halfbyte_workspace` holds the buffers its layers share."""
    source: ModelSource
    report: LoadReport
    tokenizer_folder: Path | None = None
    """Where the tokenizer is, if not beside the model."""
    splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)
    """What weights were split into, by the path of their layer; for `attach_adapters`."""

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        return load_tokenizer(self.source, folder=self.tokenizer_folder)


def load_model(
    source: str | Path | ModelSource,
    *,
    quant: QuantSpec | None,
    compute_dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    on_progress: Callable[[int, int], None] | None = None,
    allow_16bit_experts: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    residency: Residency = ON_DEVICE,
    splits: WeightSplits | None = None,
    card_shares: Mapping[torch.device, float] | None = None,
) -> LoadedModel:
    """Load a causal language model.

    Args:
        source: Hub id, folder, weight file, or what `resolve_source` made of one.
        quant: How to quantise linear layers; None leaves them in 16 bits. Weights stored in 4 bits stay as they are.
        compute_dtype: What products run in; "auto" is what the device does best.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        on_progress: Called with bytes done and bytes in all, after each tensor.
        allow_16bit_experts: Accept large stacked expert tensors, which cannot be quantised.
        attn_implementation: transformers' name of an attention implementation, or "halfbyte" for ours.
        revision: Branch, tag or commit of a hub id.
        residency: What lives in host memory while it computes on a device.
        splits: Takes out of weights what adapters begin from, before they are quantised.
        card_shares: How much of the model each of several cards is to take, in any unit; `device` is the first.

    Raises:
        ConfigError: Nothing is at `source`, or an option cannot be honoured.
        FormatError: Files that are damaged, of an unknown layout, or do not fit each other.
    """
    started = time.perf_counter()
    source = source if isinstance(source, ModelSource) else resolve_source(source, revision)
    target_device = resolve_device(device)
    computing, config = resolve_compute_dtype(compute_dtype, target_device), load_config(source)
    model = build_meta_model(config, dtype=computing.dtype, attn_implementation=attn_implementation)
    placements = make_placements(model, [tensor for _, tensor in iter_weights(source)])
    notes = [computing.note] if computing.note else []
    targets = _choose_targets(model, placements, config, quant, notes, allow_16bit_experts=allow_16bit_experts)
    _check_splits(splits, placements, source, notes)
    filler = ModelFiller(
        model,
        spec=quant,
        targets=targets,
        device=target_device,
        dtype=computing.dtype,
        slabs=_make_slabs(model, residency, target_device, targets=targets),
        keeps_views=_keeps_views(source, target_device, notes),
        splits=splits,
        split=_split_cards(model, card_shares, residency, target_device, computing.dtype, targets, notes),
    )
    fill_(filler, placements, on_progress=on_progress)
    notes += _finish_(model, filler, source, residency)
    seconds = time.perf_counter() - started
    report = make_load_report(
        model, seconds=seconds, device=target_device, compute_dtype=computing.dtype, notes=tuple(notes)
    )
    return LoadedModel(model=model, source=source, report=report, splits={} if splits is None else splits.splits)


def _check_splits(
    splits: WeightSplits | None, placements: list[Placement], source: ModelSource, notes: list[str]
) -> None:
    """Make sure that weights can be split, and say in the notes that they are."""
    if splits is None:
        return
    name = next((placement.target for placement in placements if placement.is_quantized), None)
    if name is not None:
        raise ConfigError(
            f"{source.name} holds {name} in 4 bits already, and what adapters begin from (lora.init) must be taken out "
            "of a weight before it is quantised; give the model in 16 bits that this one was made of"
        )
    notes.append(splits.note)


def _split_cards(
    model: PreTrainedModel,
    shares: Mapping[torch.device, float] | None,
    residency: Residency,
    device: torch.device,
    dtype: torch.dtype,
    targets: set[str],
    notes: list[str],
) -> CardSplit | None:
    """Return which blocks go on to other cards, adding that to the notes."""
    if shares is None or len(shares) < 2:
        return None
    if next(iter(shares)) != device:
        raise ConfigError(f"card_shares begins with {next(iter(shares))}, but the model is loaded to {device}")
    if residency != ON_DEVICE:
        raise ConfigError("a model on several cards has all its weights on them; leave streaming and offloading out")
    split = split_over_cards(model, shares, targets=targets, itemsize=dtype.itemsize)
    notes.append(str(split))
    return split


def _keeps_views(source: ModelSource, device: torch.device, notes: list[str]) -> bool:
    """Say whether tensors stay views of the files, adding that to the notes.

    What is in 4 bits already is used where it lies: its bytes are the system's file cache, shared and droppable.
    """
    keeps_views = device.type == "cpu" and source.kind == "bnb4bit"
    if keeps_views:
        notes.append("weights are mapped from the checkpoint, not copied: leave its files as they are meanwhile")
    return keeps_views


def _choose_targets(
    model: PreTrainedModel,
    placements: list[Placement],
    config: PretrainedConfig,
    quant: QuantSpec | None,
    notes: list[str],
    *,
    allow_16bit_experts: bool,
) -> set[str]:
    """Return the paths of the layers that will be in 4 bits, adding to the notes what there is to say."""
    stored_in_4bit = {p.target.removesuffix(".weight") for p in placements if p.is_quantized}
    if quant is not None:
        check_quantizable(model, placements, allow_16bit_experts=allow_16bit_experts)
        if stored_in_4bit:
            notes.append("weights stored in 4 bits are taken as they are; quant options do not apply to them")
    return stored_in_4bit or (quantizable_layers(model, config) if quant is not None else set())


def quantizable_layers(model: PreTrainedModel, config: PretrainedConfig) -> set[str]:
    """Return the paths of the linear layers that belong in 4 bits: all but the head and those the config leaves out."""
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    quantization = getattr(config, "quantization_config", None) or {}
    skipped = quantization.get("llm_int8_skip_modules") or []
    return {
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and path not in tied
        and not any(path == name or f".{name}." in f".{path}." for name in skipped)
    }


def check_quantizable(model: PreTrainedModel, placements: list[Placement], *, allow_16bit_experts: bool) -> None:
    """Refuse a model most of which would silently stay in 16 bits.

    Raises:
        ConfigError: It has large stacked tensors that nobody allowed, or no linear layers at all.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    stacked = {
        name: sizes[name]
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 3 and sizes[name] > LARGE_SHARE * total
    }
    if stacked and not allow_16bit_experts:
        share = sum(stacked.values()) / total
        raise ConfigError(
            f"{type(model).__name__}: {share:.0%} of its parameters are stacked expert tensors such as "
            f"{next(iter(stacked))}, which are no linear layers and would stay in 16 bits; set "
            "model.allow_16bit_experts=true to load it so"
        )
    if not any(type(module) is nn.Linear and module is not model.get_output_embeddings() for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} has no nn.Linear beside its head, so nothing can be kept in 4 bits (GPT-2's "
            "Conv1D layers are not supported); set quant.enabled=false or choose another model"
        )


def _make_slabs(
    model: PreTrainedModel, residency: Residency, device: torch.device, *, targets: set[str]
) -> SlabFiller | None:
    if not residency.streamed_blocks:
        return None
    if not targets:
        raise ConfigError("memory.streamed_blocks needs weights in 4 bits; set quant.enabled=true")
    return SlabFiller(
        model,
        targets=targets,
        count=residency.streamed_blocks,
        device=device,
        spill_folder=residency.spill_folder,
        on_cards=residency.on_cards,
    )


def _settle_(model: PreTrainedModel, residency: Residency, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Move the embedding where it is to live, and return what there is to say about what lives in host memory."""
    notes = []
    if residency.streamed_blocks:
        place = "in host memory" if residency.spill_folder is None else f"in files under {residency.spill_folder}"
        if residency.on_cards:
            place = "divided among the cards of this host"
        notes.append(f"{place}: weights of {residency.streamed_blocks} decoder blocks, which visit {device}")
    if residency.embedding_on_host:
        moved = host_embedding_(model, dtype=dtype, device=device)
        why_not = "embedding: stays on the device, for it is the output head as well, or does more than to look up rows"
        notes.append("in host memory: the embedding, whose rows are read from there" if moved else why_not)
    return notes


def _finish_(model: PreTrainedModel, filler: ModelFiller, source: ModelSource, residency: Residency) -> list[str]:
    """Make a whole model of what was filled, and return what there is to say about where its parts live."""
    device = filler.device
    filler.finish_()
    workspace_of(model)
    model.tie_weights(missing_keys=filler.missing(), recompute_mapping=False)
    init_computed_buffers_(model, device)
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise FormatError(f"{source.name}: {type(model).__name__} needs {empty[0]}, which nothing in the files gives")
    if filler.split is not None:
        pass_along_(model, filler.split)
    _widen_on_use_(model, filler.compute_dtype)
    if (source.folder / "generation_config.json").exists() and source.kind != "gguf":
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.config._name_or_path = source.name
    model.name_or_path = source.name
    model.requires_grad_(False)
    model.eval()
    notes = _settle_(model, residency, filler.compute_dtype, device)
    if device.type == "cuda":
        # So that the report's seconds are those of the work, not of its launching.
        torch.cuda.synchronize(device)
    return notes


def _widen_on_use_(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Replace embedding and head that are narrower than the compute dtype by modules that widen as they go."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and embedding.weight.dtype != compute_dtype:
        model.set_input_embeddings(HalfEmbedding.from_embedding(embedding, compute_dtype))
    if type(head) is nn.Linear and head.weight.dtype != compute_dtype:
        model.set_output_embeddings(HalfHead.from_linear(head, workspace=workspace_of(model)))
