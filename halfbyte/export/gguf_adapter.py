"""Write an adapter alone as a GGUF file, which llama.cpp adds to a base in any type (`--lora`).

    blk.0.attn_q.weight.lora_a   (rank, in)
    blk.0.attn_q.weight.lora_b   (out, rank), rows reordered as those of the weight are

llama.cpp knows one alpha for the whole file and multiplies each product by alpha / rank, with the rank of that tensor.
Where an adapter is scaled otherwise (rsLoRA, an alpha of a layer's own), lora_b is multiplied by the quotient:

    B' = B * scaling * rank / alpha        so that  (alpha / rank) B' A = scaling B A
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from halfbyte.errors import ConfigError
from halfbyte.export.folder import new_file
from halfbyte.export.gguf_fields import find_architecture
from halfbyte.export.gguf_file import PLAIN_TYPES, FieldValue, GgufWriter, TensorPlan
from halfbyte.export.gguf_model import make_row_order
from halfbyte.models import ModelSource, resolve_source
from halfbyte.models.adapter_files import Adapter, open_adapter
from halfbyte.models.build import build_meta_model
from halfbyte.models.describe import load_config
from halfbyte.models.gguf_names import make_tensor_names


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgufAdapterReport:
    """What was written; str() tells it."""

    type_name: str
    num_adapters: int
    num_rescaled: int
    """Adapters whose lora_b was multiplied, because llama.cpp would scale them otherwise."""
    num_bytes: int

    def __str__(self) -> str:
        text = f"{self.num_adapters} adapters in {self.type_name}: {self.num_bytes / 1e6:.1f} MB"
        if self.num_rescaled:
            text += f"\n  lora_b of {self.num_rescaled} holds what llama.cpp's alpha / rank leaves out of the scaling"
        return text


def export_gguf_adapter(
    base_source: str | Path | ModelSource, path: str | Path, *, adapter: str | Path, type_name: str = "F32"
) -> GgufAdapterReport:
    """Write an adapter as a GGUF file.

    Args:
        base_source: Hub id, folder or weight file of the base, whose weights are not read.
        path: The file to write; nothing may be there.
        adapter: Folder or file of the adapter.
        type_name: F32, F16 or BF16.

    Raises:
        ConfigError: llama.cpp cannot do what the adapter does, or something is at `path`.
        FormatError: Base or adapter is damaged, or they do not belong together.
    """
    if type_name not in PLAIN_TYPES:
        raise ConfigError(f"GGUF type {type_name!r} of an adapter; allowed: {', '.join(PLAIN_TYPES)}")
    source = base_source if isinstance(base_source, ModelSource) else resolve_source(base_source)
    config = load_config(source)
    architecture = find_architecture(config)
    model = build_meta_model(config, dtype=torch.float32)
    opened = open_adapter(model, adapter)
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    names = _names(opened, make_tensor_names(architecture, config.num_hidden_layers), tied)
    fields: dict[str, FieldValue] = {
        "general.type": "adapter",
        "general.name": Path(adapter).name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(opened.spec.alpha),
    }
    matrices: dict[str, torch.Tensor] = {}
    num_rescaled = 0
    for layer, name in names.items():
        lora_B, factor = opened.tensors.lora_B[layer].float(), _factor(opened, layer)
        order = make_row_order(name, len(lora_B), config)
        matrices[f"{name}.lora_a"] = opened.tensors.lora_A[layer]
        matrices[f"{name}.lora_b"] = (lora_B if order is None else lora_B[order]) * factor
        num_rescaled += factor != 1
    plans = [TensorPlan(name=name, shape=tuple(m.shape), type_name=type_name) for name, m in matrices.items()]
    with new_file(Path(path)) as temporary:
        writer = GgufWriter(temporary, architecture, fields, plans)
        try:
            for name, matrix in matrices.items():
                writer.write(name, [matrix])
            writer.close()
        finally:
            writer.abandon()
    return GgufAdapterReport(
        type_name=type_name, num_adapters=len(names), num_rescaled=num_rescaled, num_bytes=writer.total_bytes
    )


def _names(adapter: Adapter, tensor_names: dict[str, str], tied: set[str]) -> dict[str, str]:
    """Return the name of the weight that each adapter belongs to, by the path of its layer."""
    if adapter.spec.dora:
        raise ConfigError(
            "llama.cpp's adapters have no magnitudes, and without them a DoRA adapter is another one; export the "
            "merged model instead, without --adapter-only"
        )
    if adapter.rows or adapter.spec.vocabulary is not None:
        raise ConfigError(
            "the adapter has rows of tokens of its own, which a GGUF adapter cannot hold; merge it and export the model"
        )
    if adapter.tensors.saved:
        raise ConfigError(
            f"the adapter has modules trained whole ({', '.join(sorted(adapter.tensors.saved))}), which a GGUF adapter "
            "cannot hold; export the merged model instead, without --adapter-only"
        )
    gguf_names = {path: name for name, path in tensor_names.items()}
    names = {}
    for layer in adapter.tensors.lora_A:
        weight = f"{layer}.weight"
        if weight in tied or weight not in gguf_names:
            why = "is one tensor with the embedding" if weight in tied else "has no name in llama.cpp"
            raise ConfigError(
                f"{layer} has an adapter and {why}; export the merged model instead, without --adapter-only"
            )
        names[layer] = gguf_names[weight]
    return names


def _factor(adapter: Adapter, layer: str) -> float:
    """Return what lora_b must be multiplied by for llama.cpp's alpha / rank to give the adapter's scaling."""
    if not adapter.spec.rslora and adapter.alphas[layer] == adapter.spec.alpha:
        return 1.0
    return adapter.scaling(layer) * adapter.tensors.lora_A[layer].shape[0] / adapter.spec.alpha
