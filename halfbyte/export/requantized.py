"""Write a model, or a base with a trained adapter, as a 4-bit checkpoint that was calibrated on examples.

See `calibrated` for how. Unlike `bnb4bit`, which goes tensor by tensor, this needs the whole model in 16 or 32 bits in
memory: what each layer multiplies is only known by running those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from halfbyte.export.bnb4bit import PART_NAMES, ExportReport
from halfbyte.export.calibrated import OTHER_GRID_SHARE, quantize_calibrated_
from halfbyte.export.description import write_description
from halfbyte.export.folder import new_folder
from halfbyte.export.in_place import merge_in_place
from halfbyte.export.shards import ShardWriter
from halfbyte.models import PreTrainedModel, load_adapter, load_model, resolve_source
from halfbyte.models.describe import load_config
from halfbyte.models.run_folder import load_run_multiple
from halfbyte.models.source import ModelSource
from halfbyte.models.vocabulary import padded_vocabulary, resize_vocabulary_
from halfbyte.models.weight_splits import stored_splits
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantSpec
from halfbyte.quant.bnb_format import config_entry


def export_calibrated(
    source: str | Path | ModelSource,
    out_folder: str | Path,
    spec: QuantSpec,
    batches_BT: Sequence[torch.Tensor],
    *,
    adapter: Path | None = None,
    trained_on: QuantSpec | None = None,
    device: str | torch.device = "auto",
    allow_16bit_experts: bool = False,
    tokenizer_folder: Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write a calibrated 4-bit checkpoint in bitsandbytes' layout.

    Args:
        source: Hub id, folder or weight file of the model, or of the adapter's base.
        out_folder: May exist if it is empty.
        spec: How to quantise.
        batches_BT: Token ids to calibrate on, each (rows, tokens).
        adapter: Folder of a trained adapter to merge in first.
        trained_on: How the base was held while that was trained; None for 16 bits.
        device: Where to compute.
        allow_16bit_experts: Accept large stacked expert tensors, which stay in 16 bits.
        tokenizer_folder: Where a tokenizer lies that shall be used in place of the source's.
        overwrite: Replace what is at `out_folder`.
        on_progress: Is told how many decoder blocks are done, of how many.

    Raises:
        ConfigError: An option that cannot be honoured, or something is at `out_folder`.
        FormatError: Model or adapter is damaged or of an unknown layout.
    """
    source = source if isinstance(source, ModelSource) else resolve_source(source)
    with new_folder(Path(out_folder), overwrite=overwrite) as folder:
        model, half_dtype = _load_merged(source, adapter, trained_on, device, allow_16bit_experts=allow_16bit_experts)
        share = 1.0 if adapter is None or trained_on is None else OTHER_GRID_SHARE
        quantize_calibrated_(model, batches_BT, spec, scale_share=share, on_progress=on_progress)
        report = _write(model, folder, spec, half_dtype)
        changes = {"quantization_config": config_entry(spec, half_dtype)}
        # What an adapter has changed: a larger vocabulary, a head that is the embedding no more.
        before = load_config(source)
        for name in ("vocab_size", "tie_word_embeddings"):
            if getattr(model.config, name) != getattr(before, name):
                changes[name] = getattr(model.config, name)
        write_description(folder, source, model, dtype=half_dtype, changes=changes, tokenizer_folder=tokenizer_folder)
    return report


def _load_merged(
    source: ModelSource,
    adapter: Path | None,
    trained_on: QuantSpec | None,
    device: str | torch.device,
    *,
    allow_16bit_experts: bool,
) -> tuple[PreTrainedModel, torch.dtype]:
    """Return a model of plain layers in the compute dtype, and the 16-bit dtype it is written in."""
    quant = trained_on if adapter is not None else None
    splits = stored_splits(adapter, quant)
    loaded = load_model(source, quant=quant, device=device, allow_16bit_experts=allow_16bit_experts, splits=splits)
    computing = loaded.report.compute_dtype
    if adapter is not None:
        load_adapter(loaded.model, adapter, splits=loaded.splits)
    model = merge_in_place(loaded.model, dtype=computing)
    words, base_words = model.config.vocab_size, load_config(source).vocab_size
    if adapter is not None and words > base_words:
        resize_vocabulary_(model, padded_vocabulary(words, base_words, load_run_multiple(adapter)))
    return model.eval(), computing if computing.itemsize == 2 else torch.bfloat16


def _write(model: PreTrainedModel, folder: Path, spec: QuantSpec, dtype: torch.dtype) -> ExportReport:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    writer = ShardWriter(folder, [name + part for name in state for part in PART_NAMES])
    # In fp32 there are scales of 4-bit weights as well, which stay as they are.
    plain = {name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in state}
    plain -= {f"{path}.{name}" for path, layer in layers.items() for name, _ in layer.named_buffers()}
    parameters = 0
    try:
        for name, tensor in state.items():
            is_plain = name in plain and tensor.dtype.is_floating_point
            parameters += tensor.numel() * is_plain
            writer.add(name, tensor.to(dtype) if is_plain else tensor)
        writer.close()
    finally:
        writer.abandon()
    return ExportReport(
        num_layers_4bit=len(layers),
        parameters_4bit=sum(layer.quantized.numel for layer in layers.values()),
        parameters_16bit=parameters,
        num_bytes=writer.total_bytes,
        spec=spec,
    )
