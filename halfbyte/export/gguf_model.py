"""Write a model, merged or as it is, as one GGUF file for llama.cpp.

    names     model.layers.0.self_attn.q_proj.weight  ->  blk.0.attn_q.weight
    rows      of q and k reordered where the architecture pairs rotary dimensions as neighbours
    types     matrices in the type asked for, vectors in fp32

Merged weights come from `merge`, a few rows at a time, and are turned into the type of the file before the next: only
q and k are ever held whole, in the type of the file. Quantised types are made from fp32 sums of base and adapter, which
are rounded once; F16 and BF16 are rounded fairly, as merging rounds.

Below 8 bits the output head stays in Q8_0: its errors go straight into the logits, and llama.cpp's own quantiser
spares it too. A row must be a whole number of blocks; a matrix where it is not stays in F16, and the report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from halfbyte.data.chat import find_chat_template
from halfbyte.errors import ConfigError
from halfbyte.export.description import tokenizer_beside
from halfbyte.export.folder import new_file
from halfbyte.export.gguf_fields import (
    context_length,
    find_architecture,
    head_width,
    make_model_fields,
    rope_parameters,
    sliding_window,
)
from halfbyte.export.gguf_file import (
    PLAIN_TYPES,
    QUANTIZED_TYPES,
    FieldValue,
    GgufWriter,
    TensorPlan,
    block_sizes,
    gguf_package,
)
from halfbyte.export.gguf_vocabulary import make_vocabulary_fields
from halfbyte.export.merge import Merger, MergeReport, open_merge, stored_name
from halfbyte.models import ModelSource, PretrainedConfig, load_tokenizer
from halfbyte.models.gguf_names import (
    FAMILIES,
    ROPE_FACTORS,
    interleave_halves,
    make_rope_factors,
    make_tensor_names,
)
from halfbyte.quant import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_TYPES = ("F32", "F16", "BF16", *QUANTIZED_TYPES)
OUTPUT, EMBEDDING, HEAD_TYPE = "output.weight", "token_embd.weight", "Q8_0"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgufReport:
    """What was written; str() tells it."""

    type_name: str
    num_tensors: int
    num_bytes: int
    merged: MergeReport | None
    """None for a model without an adapter."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.num_tensors} tensors, matrices in {self.type_name}: {self.num_bytes / 1e9:.2f} GB"]
        if self.merged is not None:
            lines += str(self.merged).split("\n")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def export_gguf(
    base_source: str | Path | ModelSource,
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    type_name: str = "F16",
    onto: Literal["original", "dequantized"] = "dequantized",
    spec: QuantSpec | Literal["run"] | None = "run",
    pre_tokenizer: str | None = None,
) -> GgufReport:
    """Write a model as a GGUF file.

    Args:
        base_source: Hub id, folder or weight file of the model, or of the adapter's base.
        path: The file to write; nothing may be there.
        adapter: Folder or file of an adapter to merge. A tokenizer beside it is written in place of the base's.
        type_name: Of matrices: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0.
        onto: As for `merge_adapter`.
        spec: Likewise; without an adapter the base is taken as it is unless one is given.
        pre_tokenizer: llama.cpp's name for the rules by which words are split; None to recognise them.

    Raises:
        ConfigError: llama.cpp has nothing like the model or its tokenizer, or something is at `path`.
        FormatError: Model or adapter is damaged, or they do not belong together.
    """
    if type_name not in MODEL_TYPES:
        raise ConfigError(f"GGUF type {type_name!r}; allowed: {', '.join(MODEL_TYPES)}")
    dtype = PLAIN_TYPES.get(type_name, torch.float32)
    merger = open_merge(base_source, adapter, onto=onto, dtype=dtype, spec=spec, keeps_vectors=True)
    config = merger.model.config
    tokenizer = load_tokenizer(merger.source, folder=tokenizer_beside(adapter))
    fields = _fields(merger, tokenizer, type_name, pre_tokenizer)
    plans = _make_plans(merger, type_name)
    with new_file(Path(path)) as temporary:
        writer = GgufWriter(temporary, find_architecture(config), fields, list(plans.values()))
        try:
            merger.write_weights(_ModelTensors(merger, writer, plans))
            if ROPE_FACTORS in plans:
                writer.write(ROPE_FACTORS, [make_rope_factors(rope_parameters(config), head_width(config) // 2)])
            writer.close()
        finally:
            writer.abandon()
    return GgufReport(
        type_name=type_name,
        num_tensors=len(plans),
        num_bytes=writer.total_bytes,
        merged=None if adapter is None else merger.report(writer.total_bytes),
        notes=tuple(_notes(config, plans, type_name)),
    )


class _ModelTensors:
    """What gives a merged model's tensors the names, the order of rows and the types of the file."""

    def __init__(self, merger: Merger, writer: GgufWriter, plans: dict[str, TensorPlan]) -> None:
        self._writer = writer
        self._plans = plans
        self._config = merger.model.config
        self._tied = _tied(merger)
        self._paths = {stored_name(placement): placement.target for placement in merger.placements}
        self._written: set[str] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        self.add_parts(name, [tensor], dtype=tensor.dtype, shape=tuple(tensor.shape))

    def add_parts(
        self, name: str, parts: Iterable[torch.Tensor], *, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """Write a tensor that comes in parts."""
        path = self._paths.get(name, name)
        path = self._tied.get(path, path)
        # A checkpoint may hold what is one tensor twice.
        if path not in self._written:
            self._written.add(path)
            plan = self._plans[path]
            assert plan.shape == shape, f"{name}: {shape} for {plan}"
            self._writer.write(plan.name, parts, row_order=make_row_order(plan.name, shape[0], self._config))


def make_row_order(name: str, num_rows: int, config: PretrainedConfig) -> torch.Tensor | None:
    """Return which row of the model each row of a tensor of the file is, None where the order is the same."""
    if not FAMILIES[find_architecture(config)].interleaved_rotary or not (".attn_q." in name or ".attn_k." in name):
        return None
    num_heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return interleave_halves(torch.arange(num_rows), num_heads)


def _tied(merger: Merger) -> dict[str, str]:
    """Return which parameter stands for another in the file."""
    return {} if merger.untied else dict(merger.model.all_tied_weights_keys)


def _make_plans(merger: Merger, type_name: str) -> dict[str, TensorPlan]:
    """Return what will be in the file, by the path of the parameter, in the order of the model."""
    config, tied = merger.model.config, _tied(merger)
    names = make_tensor_names(find_architecture(config), config.num_hidden_layers)
    gguf_names = {path: name for name, path in names.items()}
    shapes = {path: tuple(tensor.shape) for path, tensor in merger.model.state_dict().items() if path not in tied}
    unknown = sorted(shapes.keys() - gguf_names.keys())
    if unknown:
        raise ConfigError(f"llama.cpp has no place for {', '.join(unknown[:3])} in this architecture")
    head = EMBEDDING if tied else OUTPUT
    plans = {}
    for path, shape in shapes.items():
        name = gguf_names[path]
        plans[path] = TensorPlan(name=name, shape=shape, type_name=_type_of(name, shape, type_name, head))
    if rope_parameters(config)["rope_type"] == "llama3":
        plans[ROPE_FACTORS] = TensorPlan(name=ROPE_FACTORS, shape=(head_width(config) // 2,), type_name="F32")
    return plans


def _type_of(name: str, shape: tuple[int, ...], type_name: str, head: str) -> str:
    if len(shape) < 2:
        return "F32"
    if name == head and type_name in QUANTIZED_TYPES:
        type_name = HEAD_TYPE
    return type_name if shape[-1] % block_sizes(type_name)[0] == 0 else "F16"


def _fields(
    merger: Merger, tokenizer: PreTrainedTokenizerBase, type_name: str, pre_tokenizer: str | None
) -> dict[str, FieldValue]:
    config, gguf = merger.model.config, gguf_package()
    file_type = "ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"
    end_of_turn = find_chat_template(tokenizer).end_of_turn if tokenizer.chat_template else None
    return {
        "general.type": "model",
        "general.name": Path(merger.source.name).name,
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        **make_model_fields(config),
        **make_vocabulary_fields(
            tokenizer,
            vocab_size=config.vocab_size,
            end_of_turn=(end_of_turn or "").strip(),
            pre_tokenizer=pre_tokenizer,
        ),
    }


def _notes(config: PretrainedConfig, plans: dict[str, TensorPlan], type_name: str) -> Iterator[str]:
    types = [plan.type_name for plan in plans.values() if len(plan.shape) > 1]
    if type_name in QUANTIZED_TYPES and "F16" in types:
        yield f"{types.count('F16')} matrices in F16: their rows are no whole number of blocks"
    if type_name in QUANTIZED_TYPES and type_name != HEAD_TYPE and HEAD_TYPE in types:
        yield f"the output head in {HEAD_TYPE}"
    if context_length(config) < config.max_position_embeddings:
        yield (
            f"llama.cpp has no sliding window for this architecture: the context ends with it, at "
            f"{sliding_window(config)} tokens in place of {config.max_position_embeddings}"
        )
