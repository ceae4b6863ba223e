"""Write a model in bitsandbytes' 4-bit layout, which plain transformers loads.

Tensor by tensor, like merging: a weight is read from its mapped file, quantised, and written before the next is read.
Linear layers are chosen as transformers chooses them, so that nothing has to be named in the configuration.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from halfbyte.errors import ConfigError
from halfbyte.export.description import write_description
from halfbyte.export.folder import new_folder
from halfbyte.export.shards import ShardWriter
from halfbyte.models import PretrainedConfig, PreTrainedModel
from halfbyte.models.build import build_meta_model
from halfbyte.models.describe import load_config
from halfbyte.models.load import check_quantizable, quantizable_layers
from halfbyte.models.placement import Placement, make_placements
from halfbyte.models.source import ModelSource, resolve_source
from halfbyte.models.weights import iter_weights
from halfbyte.ops import quantize_4bit
from halfbyte.quant import QuantSpec
from halfbyte.quant.bnb_format import config_entry, export_state_dict

# What a 4-bit weight's parts are called, for the room that headers need.
PART_NAMES = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written; str() tells it."""

    num_layers_4bit: int
    parameters_4bit: int
    parameters_16bit: int
    num_bytes: int
    spec: QuantSpec

    def __str__(self) -> str:
        share = self.parameters_16bit / max(1, self.parameters_4bit + self.parameters_16bit)
        double = ", double quantisation" if self.spec.double_quant else ""
        return (
            f"{self.num_layers_4bit} linear layers in {self.spec.codebook}, blocks of {self.spec.block_size}{double}; "
            f"{share:.1%} of the parameters left in 16 bits; {self.num_bytes / 1e9:.2f} GB"
        )


def export_bnb4bit(
    source: str | Path | ModelSource,
    out_folder: str | Path,
    spec: QuantSpec,
    *,
    dtype: torch.dtype | None = None,
    allow_16bit_experts: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write a 4-bit checkpoint.

    Args:
        source: Hub id, folder or weight file of a model in 16 or 32 bits.
        out_folder: May exist if it is empty.
        spec: How to quantise.
        dtype: Of what stays in 16 bits, and of products; the model's own unless given, bfloat16 for one in 32 bits.
        allow_16bit_experts: Accept large stacked expert tensors, which stay in 16 bits.
        overwrite: Replace what is at `out_folder`.

    Raises:
        ConfigError: An option that cannot be honoured, or something is at `out_folder`.
        FormatError: The model is damaged or of an unknown layout.
    """
    source = source if isinstance(source, ModelSource) else resolve_source(source)
    config = load_config(source)
    model = build_meta_model(config, dtype=torch.float32)
    placements = make_placements(model, [tensor for _, tensor in iter_weights(source)])
    if any(placement.is_quantized for placement in placements):
        raise ConfigError(f"{source.name} is in 4 bits already")
    check_quantizable(model, placements, allow_16bit_experts=allow_16bit_experts)
    half_dtype = dtype or _half_dtype(config)
    layers = quantizable_layers(model, config)
    with new_folder(Path(out_folder), overwrite=overwrite) as folder:
        writer = ShardWriter(folder, _names(model, placements))
        try:
            counts = [_write(placement, model, layers, spec, half_dtype, writer) for placement in placements]
            writer.close()
        finally:
            writer.abandon()
        changes = {"quantization_config": config_entry(spec, half_dtype)}
        write_description(folder, source, model, dtype=half_dtype, changes=changes)
    return ExportReport(
        num_layers_4bit=sum(num_layers for num_layers, _ in counts),
        parameters_4bit=sum(model.get_parameter(f"{path}.weight").numel() for path in layers),
        parameters_16bit=sum(parameters for _, parameters in counts),
        num_bytes=writer.total_bytes,
        spec=spec,
    )


def _half_dtype(config: PretrainedConfig) -> torch.dtype:
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _names(model: PreTrainedModel, placements: list[Placement]) -> list[str]:
    stored = {tensor.name for placement in placements for tensor in placement.tensors}
    return [name + part for name in sorted(stored | model.state_dict().keys()) for part in PART_NAMES]


def _write(
    placement: Placement,
    model: PreTrainedModel,
    layers: set[str],
    spec: QuantSpec,
    dtype: torch.dtype,
    writer: ShardWriter,
) -> tuple[int, int]:
    """Write what one placement becomes; return the layers in 4 bits and the parameters in 16."""
    if placement.rule is None:
        name = placement.tensors[0].name
        tensors = {name: (placement.target, placement.tensors[0].read)}
    elif any(name.removesuffix(".weight") in layers for name in placement.products()):
        made = placement.convert(model)
        tensors = {name: (name, value.clone) for name, value in made.items()}
    else:
        # Tensors that rules join into something else than a linear layer are copied under their own names.
        tensors = {tensor.name: ("", tensor.read) for tensor in placement.tensors}
    num_layers = parameters = 0
    for name, (target, read) in tensors.items():
        value = read()
        if target.removesuffix(".weight") in layers and target.endswith(".weight"):
            q = dataclasses.replace(quantize_4bit(value, spec), dtype=dtype)
            for key, part in export_state_dict(name.removesuffix("weight"), q).items():
                writer.add(key, part)
            num_layers += 1
        else:
            writer.add(name, value.to(dtype) if value.dtype.is_floating_point else value)
            parameters += value.numel()
    return num_layers, parameters
