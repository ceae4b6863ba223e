"""The folder that a run leaves: an adapter, what it was trained on, and how its base was held."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from halfbyte.config.load import make_section, read_yaml
from halfbyte.config.output import RUN_FILE
from halfbyte.errors import ConfigError
from halfbyte.models.adapter_config import read_adapter_config
from halfbyte.models.adapter_files import load_adapter
from halfbyte.models.load import LoadedModel, load_model
from halfbyte.models.weight_splits import stored_splits
from halfbyte.quant import QuantSpec


def load_run(
    path: str | Path,
    *,
    base_model: str | Path | None = None,
    compute_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trainable: bool = False,
) -> LoadedModel:
    """Load a run: its base, held as in training, with its adapter on top.

    Args:
        path: Folder of a run, or of an adapter made elsewhere, or the adapter's file. Without a run.yaml the base is
            held in NF4 with double quantisation.
        base_model: In place of the one that the folder names, for a base that has moved.
        compute_dtype: In place of the run's.
        device: In place of the run's.
        attn_implementation: In place of the run's.
        trainable: Whether training goes on.

    Raises:
        ConfigError: The folder names no base, or the base is not to be found.
        FormatError: Adapter or base is damaged, or they do not belong together.
    """
    path = Path(path)
    adapter_config = read_adapter_config(path)
    values = _run_values(path)
    base = base_model or values.get("model.path") or adapter_config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{path}: adapter_config.json names no base model; name it with base_model")
    options = make_section("model", values | {"model.path": str(base)})
    quant = load_run_quant(path)
    loaded = load_model(
        base,
        quant=quant,
        compute_dtype=compute_dtype or _run_dtype(values, options.dtype),
        device=device or options.device,
        allow_16bit_experts=options.allow_16bit_experts,
        attn_implementation=attn_implementation or options.attention,
        revision=options.revision or adapter_config.get("revision"),
        splits=stored_splits(path, quant),
    )
    load_adapter(loaded.model, path, trainable=trainable, splits=loaded.splits)
    folder = path if path.is_dir() else path.parent
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    return dataclasses.replace(loaded, tokenizer_folder=folder if has_tokenizer else None)


def load_run_quant(path: Path) -> QuantSpec | None:
    """Return how the base of a run was quantised, None where it was not; NF4 where the folder does not say.

    Args:
        path: Folder of a run or an adapter, or a file in it.
    """
    quant = make_section("quant", _run_values(path))
    if not quant.enabled:
        return None
    return QuantSpec(codebook=quant.codebook, block_size=quant.block_size, double_quant=quant.double_quant)


def load_run_multiple(path: Path) -> int:
    """Return what the vocabulary of a run becomes a multiple of where its matrices are written; 1 where none says.

    Args:
        path: As for `load_run_quant`.
    """
    return make_section("model", {"model.path": ""} | _run_values(path)).pad_vocabulary_to


def _run_dtype(values: dict[str, Any], dtype: str) -> str:
    """Return the run's compute dtype: train.bf16 and train.fp16 are model.dtype by their usual names."""
    train = make_section("train", values)
    return "bfloat16" if train.bf16 else "float16" if train.fp16 else dtype


def _run_values(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    return read_yaml(folder / RUN_FILE) if (folder / RUN_FILE).exists() else {}
