"""The files beside the weights of a model we write: configuration, generation defaults, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from halfbyte.models import PreTrainedModel
from halfbyte.models.adapter_files import find_adapter_weights
from halfbyte.models.describe import load_tokenizer
from halfbyte.models.source import ModelSource, load_config_dict

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"


def write_description(
    folder: Path,
    source: ModelSource,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    changes: dict[str, Any],
    tokenizer_folder: Path | None = None,
) -> None:
    """Write what transformers needs beside the weights.

    Args:
        folder: Where to.
        source: Where the model came from; its files are copied as they are where it is a folder.
        model: Of the source, for what a GGUF file does not spell out.
        dtype: Of the weights written.
        changes: Entries of config.json to set, or to remove where the value is None.
        tokenizer_folder: Where a tokenizer lies that shall be used in place of the source's.
    """
    config = _source_config(source, model)
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = _name(dtype)
    config.setdefault("dtype", _name(dtype))
    config.setdefault("architectures", [type(model).__name__])
    for name, value in {"quantization_config": None, **changes}.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if source.kind == "gguf":
        model.generation_config.save_pretrained(folder)
    elif (source.folder / GENERATION_FILE).exists():
        shutil.copyfile(source.folder / GENERATION_FILE, folder / GENERATION_FILE)
    _write_tokenizer(folder, source, tokenizer_folder)


def tokenizer_beside(adapter: str | Path | None) -> Path | None:
    """Return the folder of an adapter if a tokenizer lies there, which is then used in place of the base's."""
    if adapter is None:
        return None
    folder = find_adapter_weights(Path(adapter)).parent
    return folder if (folder / "tokenizer_config.json").exists() else None


def _source_config(source: ModelSource, model: PreTrainedModel) -> dict[str, Any]:
    if source.kind != "gguf":
        return load_config_dict(source.folder)
    config = json.loads(model.config.to_json_string(use_diff=True))
    for name in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(name, None)
    return config


def _write_tokenizer(folder: Path, source: ModelSource, tokenizer_folder: Path | None) -> None:
    if tokenizer_folder is None and source.kind == "gguf":
        load_tokenizer(source).save_pretrained(folder)
        return
    origin = tokenizer_folder or source.folder
    for name in TOKENIZER_FILES:
        if (origin / name).exists():
            shutil.copyfile(origin / name, folder / name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
