"""What stands beside the weights: configuration and tokenizer, read by transformers. A model's own code never runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from halfbyte.errors import FormatError
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_names import check_architecture, make_rope_parameters
from halfbyte.models.source import ModelSource, load_config_dict


def load_config(source: ModelSource) -> PretrainedConfig:
    """Return the configuration of a model.

    Raises:
        FormatError: It is damaged, of an unknown type, or needs code of its own.
    """
    if source.kind == "gguf":
        return _load_gguf_config(source)
    raw = load_config_dict(source.folder)
    path = source.folder / "config.json"
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise FormatError(
                f"{path}: this model brings its own code (auto_map), which is never run, and transformers has no class "
                f"for {model_type!r}"
            )
        raise FormatError(f"{path}: model_type {model_type!r} is unknown to this release of transformers; update it")
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        return AutoConfig.from_pretrained(source.folder, **options)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise FormatError(f"{path} is not a valid configuration of {model_type!r}: {error}") from error


def load_tokenizer(source: ModelSource, *, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Args:
        source: The model.
        folder: Where the tokenizer is, if not beside the model.

    Raises:
        FormatError: There is none, or it cannot be read.
    """
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file and folder is None else {}
    try:
        return AutoTokenizer.from_pretrained(folder or source.folder, trust_remote_code=False, **options)
    except (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise FormatError(f"{folder or source.folder}: no tokenizer can be read there: {error}") from error


def _load_gguf_config(source: ModelSource) -> PretrainedConfig:
    file = GgufFile(source.weight_files[0])
    check_architecture(file)
    rope_parameters = make_rope_parameters(file)
    config = AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file)
    head_dim = file.fields.get(f"{file.fields['general.architecture']}.attention.key_length")
    if head_dim is not None:
        config.head_dim = head_dim
    if rope_parameters is not None:
        config.rope_parameters = rope_parameters
    return config
