"""Merge an adapter into its base: one plain transformers model, written tensor by tensor.

    W' = W + scaling * B A        in fp32, a block of rows at a time, rounded once; DoRA scales the rows of that

**Which W** is for the person to choose, because they differ. `dequantized` is what the adapter saw in training, the
4-bit form written out: the merged model is the tuned model. `original` is the base's own weights in 16 or 32 bits: a
better base, but not the one whose errors the adapter learnt to make up for. On SmolLM2-135M, held-out loss 1.447 with
the adapter on NF4 became 1.447 and 1.494.

**Rounding** decides whether the update survives. W lies on the grid of its 16-bit dtype, and most of an adapter's
updates are smaller than half a step of it: rounded to nearest they vanish. 16-bit results are therefore rounded fairly
(see `rounding`), and the report says how much of the update the file holds. float32 keeps all of it at twice the size.
Onto the original weights in bfloat16, the same adapter gave 1.4940 in float32, 1.4945 so, and 1.5012 to nearest.

Tensors that no adapter touches are copied byte for byte, unless a dtype is asked for. Peak memory is one tensor: the
base is mapped, results go to the file as they are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.errors import ConfigError, FormatError
from halfbyte.export.base_rows import iter_base_rows, update_of_rows
from halfbyte.export.description import tokenizer_beside, write_description
from halfbyte.export.folder import new_folder
from halfbyte.export.rounding import generator_for, round_fairly
from halfbyte.export.shards import ShardWriter, TensorWriter
from halfbyte.export.vocabulary_rows import VocabularyRows
from halfbyte.models import PreTrainedModel
from halfbyte.models.adapter_files import Adapter, find_adapter_weights, open_adapter
from halfbyte.models.adapter_tensors import AdapterTensors
from halfbyte.models.build import build_meta_model
from halfbyte.models.describe import load_config
from halfbyte.models.load import quantizable_layers
from halfbyte.models.placement import Placement, make_placements
from halfbyte.models.run_folder import load_run_multiple, load_run_quant
from halfbyte.models.source import ModelSource, resolve_source
from halfbyte.models.weight_splits import halve_adapter, has_halves
from halfbyte.models.weights import LazyTensor, iter_weights
from halfbyte.nn import LoraSpec
from halfbyte.nn.split import Factors, quantize_rest
from halfbyte.ops import quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.bnb_format import load_quantized

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NO_ADAPTER = Adapter(spec=LoraSpec(), tensors=AdapterTensors(lora_A={}, lora_B={}, magnitude={}, saved={}), alphas={})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What merging did; str() tells it."""

    num_adapters: int
    onto: str
    dtype: torch.dtype
    reason: str
    """Why this dtype."""
    kept_update: float
    """The share of the update that the written weights hold, measured along the update; 1 is all of it."""
    num_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        base = {"original": "the original weights", "dequantized": "the 4-bit weights, written out"}[self.onto]
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{self.num_bytes / 1e9:.2f} GB in {dtype}"
        lines = (
            f"merged {self.num_adapters} adapters onto {base}: {size} ({self.reason})",
            f"  {self.kept_update:.1%} of the update is in the written weights",
            *(f"  {note}" for note in self.notes),
        )
        return "\n".join(lines)


def merge_adapter(
    base_source: str | Path | ModelSource,
    adapter: str | Path,
    out_folder: str | Path,
    *,
    onto: Literal["original", "dequantized"] = "dequantized",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    spec: QuantSpec | Literal["run"] | None = "run",
    overwrite: bool = False,
) -> MergeReport:
    """Write base and adapter as one plain transformers model.

    Args:
        base_source: Hub id, folder or weight file of the base.
        adapter: Folder or file of the adapter. A tokenizer beside it is written in place of the base's.
        out_folder: May exist if it is empty.
        onto: The 4-bit form of the base, or its own weights. Weights that are stored in 4 bits are their own base.
        dtype: Of the result; "auto" keeps what each tensor has, and merges into the model's own dtype.
        spec: How the base was quantised in training, None where it was not; "run" reads it from the run.yaml beside
            the adapter, and takes NF4 with double quantisation where there is none.
        overwrite: Replace what is at `out_folder`.

    Raises:
        ConfigError: An option that cannot be honoured, or something is at `out_folder`.
        FormatError: Base or adapter is damaged, or they do not belong together.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    merger = open_merge(base_source, adapter, onto=onto, dtype=DTYPES.get(dtype), spec=spec)
    with new_folder(Path(out_folder), overwrite=overwrite) as folder:
        writer = ShardWriter(folder, merger.names())
        try:
            merger.write_weights(writer)
            writer.close()
        finally:
            writer.abandon()
        write_description(
            folder,
            merger.source,
            merger.model,
            dtype=merger.dtype,
            changes=merger.words.config_changes | ({"tie_word_embeddings": False} if merger.untied else {}),
            tokenizer_folder=tokenizer_beside(adapter),
        )
    return merger.report(writer.total_bytes)


def open_merge(
    base_source: str | Path | ModelSource,
    adapter: str | Path | None,
    *,
    onto: str,
    dtype: torch.dtype | None,
    spec: QuantSpec | Literal["run"] | None,
    keeps_vectors: bool = False,
) -> Merger:
    """Read everything but the base's weights, and settle what becomes of each of them.

    Args:
        base_source: As for `merge_adapter`.
        adapter: Likewise; None for the base as it is.
        onto: Likewise.
        dtype: Of the result; None keeps what each tensor has, and merges into the model's own dtype.
        spec: As for `merge_adapter`.
        keeps_vectors: Leave tensors of one dimension in the dtype they have, whatever `dtype` is.

    Raises:
        ConfigError: An option that cannot be honoured.
        FormatError: Base or adapter is damaged, or they do not belong together.
    """
    if onto not in ("original", "dequantized"):
        raise ConfigError(f"onto is {onto!r}; allowed: original, dequantized")
    source = base_source if isinstance(base_source, ModelSource) else resolve_source(base_source)
    config = load_config(source)
    model = build_meta_model(config, dtype=torch.float32)
    placements = make_placements(model, [tensor for _, tensor in iter_weights(source)])
    opened = NO_ADAPTER if adapter is None else open_adapter(model, adapter)
    words = VocabularyRows.of(model, opened, multiple=1 if adapter is None else load_run_multiple(Path(adapter)))
    taken: dict[str, Factors] = {}
    if spec == "run":
        spec = None if adapter is None else load_run_quant(Path(adapter))
    layers = set()
    if onto == "dequantized" and spec is not None and not any(placement.is_quantized for placement in placements):
        layers = quantizable_layers(model, config)
        if adapter is not None and has_halves(find_adapter_weights(Path(adapter))):
            opened, taken = halve_adapter(opened)
    merger = Merger(source, model, placements, opened, onto=onto, spec=spec, layers=layers, dtype=dtype)
    merger.keeps_vectors, merger.words, merger.taken = keeps_vectors, words, taken
    return merger


class Merger:
    """Everything that decides what becomes of one tensor.

    Attributes:
        source: Where the base comes from.
        model: Of the base, on the meta device.
        placements: Which of its tensors make which parameter.
        dtype: Of merged weights.
        untied: Whether parameters that were one tensor become two.
        keeps_vectors: Leave tensors of one dimension in the dtype they have.
        words: Rows of embedding and head that the adapter holds.
        taken: What is taken out of weights before they are quantised, see `weight_splits`.
    """

    def __init__(
        self,
        source: ModelSource,
        model: PreTrainedModel,
        placements: list[Placement],
        adapter: Adapter,
        *,
        onto: str,
        spec: QuantSpec | None,
        layers: set[str],
        dtype: torch.dtype | None,
    ) -> None:
        """Settle the dtype; `layers` are those whose weights are replaced by their 4-bit form, written out."""
        self.source = source
        self.model = model
        self.placements = placements
        self.keeps_vectors = False
        self.words = VocabularyRows(size=None, rows={})
        self.taken: dict[str, Factors] = {}
        self._onto = onto
        self._adapter = adapter
        self._spec = spec
        self._layers = layers
        self._asked_dtype = dtype
        self.dtype = dtype or torch.bfloat16
        self._reason = "as asked"
        self._saved = {f"{path}.{name}": t for path, ts in adapter.tensors.saved.items() for name, t in ts.items()}
        self.untied = self._find_untied()
        self._written: set[str] = set()
        # Sums of update * update and of update * (written - base), for the report.
        self._update_square = 0.0
        self._update_kept = 0.0
        if dtype is None:
            self._choose_dtype()

    def _choose_dtype(self) -> None:
        """Take the dtype of the model's own weights."""
        counts: dict[torch.dtype, int] = {}
        for placement in self.placements:
            for tensor in placement.tensors:
                if self.source.kind != "gguf" and tensor.dtype in DTYPES.values() and not placement.is_quantized:
                    counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_bytes
        self.dtype = max(counts, key=lambda found: counts[found]) if counts else torch.bfloat16
        rounded = "" if self.dtype == torch.float32 else ", rounded so that small updates survive"
        self._reason = ("the model's own" if counts else "what a 4-bit base is usually computed in") + rounded

    def write_weights(self, writer: TensorWriter) -> None:
        """Give all weights of the merged model to a writer, under the names that the checkpoint has for them."""
        for placement in self.placements:
            self._write(placement, writer)
        self._write_untied(writer)

    def names(self) -> list[str]:
        """Return the name of every tensor that may be written."""
        names = [name for p in self.placements for name in (p.target, *(tensor.name for tensor in p.tensors))]
        products = [name for p in self.placements if p.rule is not None for name in self.model.state_dict()]
        tied = [name for pair in self.model.all_tied_weights_keys.items() for name in pair]
        return [*names, *products, *self._saved, *tied]

    def _write(self, placement: Placement, writer: TensorWriter) -> None:
        """Write what one placement becomes."""
        if placement.rule is not None:
            self._write_converted(placement, writer)
            return
        name, path = stored_name(placement), placement.target.removesuffix(".weight")
        self._written.add(placement.target)
        if placement.target in self._saved:
            writer.add(name, self._cast(self.words.resize(placement.target, self._saved[placement.target]), name))
        elif self.words.touches(placement.target):
            self._write_words(name, placement.target, placement, writer)
        elif placement.is_quantized or path in self._layers or path in self._adapter.tensors.lora_A:
            self._write_layer(name, path, self._base_of(placement, path), writer)
        else:
            self._copy(placement.tensors[0], writer)

    def _write_untied(self, writer: TensorWriter) -> None:
        """Write parameters that shared a tensor with another and no longer equal it, such as a tied head."""
        if not self.untied:
            return
        tied = self.model.all_tied_weights_keys
        by_target = {placement.target: placement for placement in self.placements}
        for name in sorted((tied.keys() | set(tied.values())) - self._written):
            partner = tied.get(name) or next(target for target, source in tied.items() if source == name)
            path = name.removesuffix(".weight")
            if name in self._saved:
                writer.add(name, self._cast(self.words.resize(name, self._saved[name]), name))
            elif self.words.touches(name):
                self._write_words(name, name, by_target[partner], writer)
            elif path in self._adapter.tensors.lora_A:
                self._write_layer(name, path, self._base_of(by_target[partner], path), writer)
            else:
                writer.add(name, self._cast(by_target[partner].tensors[0].read(), name))
            self._written.add(name)

    def report(self, num_bytes: int) -> MergeReport:
        """Return what was done, once the weights are written."""
        notes, onto = [], self._onto
        if any(placement.is_quantized for placement in self.placements):
            onto = "dequantized"
            notes.append("the base is stored in 4 bits: its 4-bit weights are what it has")
        elif onto == "dequantized" and self._spec is None:
            onto = "original"
            notes.append("the base was not quantised in training: its own weights are what the adapter saw")
        notes += self.words.notes
        if self.untied:
            notes.append("embedding and head were one tensor; one was trained whole, so they are two now")
        return MergeReport(
            num_adapters=len(self._adapter.tensors.lora_A),
            onto=onto,
            dtype=self.dtype,
            reason=self._reason,
            kept_update=self._update_kept / self._update_square if self._update_square else 1.0,
            num_bytes=num_bytes,
            notes=tuple(notes),
        )

    def _find_untied(self) -> bool:
        changed = self._saved.keys() | {f"{path}.weight" for path in self._adapter.tensors.lora_A}
        return any(name in changed for pair in self.model.all_tied_weights_keys.items() for name in pair)

    def _base_of(self, placement: Placement, path: str) -> torch.Tensor | QuantizedTensor:
        """Return the base weight, in the form whose values it has."""
        if placement.is_quantized:
            parts = {tensor.name: tensor.read().clone() for tensor in placement.tensors}
            return load_quantized(stored_name(placement).removesuffix("weight"), parts)
        return self._quantized_if_meant(placement.tensors[0].read(), path)

    def _quantized_if_meant(self, weight: torch.Tensor, path: str) -> torch.Tensor | QuantizedTensor:
        spec = self._spec if path in self._layers else None
        if path in self.taken:
            return quantize_rest(weight, self.taken[path], self._adapter.scaling(path), spec)
        return weight if spec is None else quantize_4bit(weight, spec)

    def _write_words(self, name: str, target: str, placement: Placement, writer: TensorWriter) -> None:
        """Write embedding or head with the rows that the adapter has for it."""
        tensor = placement.tensors[0]
        dtype = self._kept_dtype(tensor)
        writer.add(name, self._cast(self.words.put(target, tensor.read()), name, dtype))

    def _kept_dtype(self, tensor: LazyTensor) -> torch.dtype:
        """Return the dtype of a tensor that is only copied."""
        is_16bit_result = self._asked_dtype is None and tensor.storage_dtype == tensor.dtype
        return tensor.dtype if is_16bit_result or not tensor.dtype.is_floating_point else self.dtype

    def _write_layer(self, name: str, path: str, base: torch.Tensor | QuantizedTensor, writer: TensorWriter) -> None:
        num_rows, width = base.shape
        writer.add_parts(name, self._merged_rows(name, path, base), dtype=self.dtype, shape=(num_rows, width))

    def _merged_rows(self, name: str, path: str, base: torch.Tensor | QuantizedTensor) -> Iterator[torch.Tensor]:
        tensors, generator = self._adapter.tensors, generator_for(name)
        for rows, values in iter_base_rows(base):
            if path not in tensors.lora_A:
                yield self._cast(values, name)
                continue
            magnitude = tensors.magnitude.get(path)
            update = update_of_rows(
                values,
                tensors.lora_A[path],
                tensors.lora_B[path][rows],
                scaling=self._adapter.scaling(path),
                magnitude=None if magnitude is None else magnitude[rows],
            )
            merged = values + update
            self._check_range(merged, name)
            written = round_fairly(merged, self.dtype, generator=generator)
            self._update_square += float(update.square().sum(dtype=torch.float64))
            self._update_kept += float((written.float() - values).mul_(update).sum(dtype=torch.float64))
            yield written

    def _write_converted(self, placement: Placement, writer: TensorWriter) -> None:
        """Copy the tensors behind a rule as they are, unless the merge touches a parameter that the rule makes."""
        touched = {f"{path}.weight" for path in (*self._layers, *self._adapter.tensors.lora_A)} | self._saved.keys()
        if not touched & set(placement.products()):
            for tensor in placement.tensors:
                self._copy(tensor, writer)
            return
        for name, made in placement.convert(self.model).items():
            self._written.add(name)
            path = name.removesuffix(".weight")
            if name in self._saved:
                writer.add(name, self._cast(self._saved[name], name))
            elif name in touched:
                self._write_layer(name, path, self._quantized_if_meant(made, path), writer)
            else:
                writer.add(name, self._cast(made, name))

    def _copy(self, tensor: LazyTensor, writer: TensorWriter) -> None:
        self._written.add(tensor.name)
        dtype, value = self._kept_dtype(tensor), tensor.read()
        if dtype == tensor.dtype:
            writer.add(tensor.name, value)
        elif value.dim() == 2:
            rows = (self._cast(values, tensor.name) for _, values in iter_base_rows(value))
            writer.add_parts(tensor.name, rows, dtype=dtype, shape=tensor.shape)
        else:
            writer.add(tensor.name, self._cast(value, tensor.name))

    def _cast(self, value: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.keeps_vectors and value.dim() == 1:
            return value
        self._check_range(value, name)
        return value.to(dtype or self.dtype)

    def _check_range(self, value: torch.Tensor, name: str) -> None:
        if self.dtype == torch.float16 and value.numel():
            largest = float(value.abs().max())
            if largest > torch.finfo(torch.float16).max:
                raise FormatError(f"{name} reaches {largest:.3g}, beyond float16; merge to bfloat16 or float32")


def stored_name(placement: Placement) -> str:
    """Return the name that the checkpoint has for a parameter."""
    names: list[Any] = [tensor.name for tensor in placement.tensors]
    return min(names, key=len) if placement.is_quantized else names[0]
