"""Where a model comes from: a folder, a file, or a repository of the hub, and what kind of weights lie there.

Kinds of weights:

    safetensors   16 or 32 bits a weight, in one file or in shards named by an index
    bnb4bit       safetensors that hold bitsandbytes' 4-bit layout
    gguf          one GGUF file, which carries configuration and tokenizer too
    pickle        one pickled file, read only where a person named that very file

Weights quantised in any other way, and configurations that bring their own code, are refused with the reason.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import ConfigError, FormatError
from halfbyte.models.described import INDEX_FILE, load_json, shard_names
from halfbyte.models.hub import download, download_file, is_hub_file, is_hub_id

SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model on this machine."""

    kind: Literal["safetensors", "bnb4bit", "gguf", "pickle"]
    name: str
    """As a person wrote it."""
    folder: Path
    """Where configuration and tokenizer are."""
    weight_files: tuple[Path, ...]
    revision: str | None = None

    @property
    def gguf_file(self) -> str | None:
        """The argument that tells transformers to read configuration or tokenizer from a GGUF file."""
        return self.weight_files[0].name if self.kind == "gguf" else None


def resolve_source(source: str | Path, revision: str | None = None) -> ModelSource:
    """Find a model and say what it is; a hub id is downloaded, unless it is in the hub's cache.

    Args:
        source: Folder, weight file (.gguf, .safetensors, .bin), hub id, or hub id and GGUF file (`owner/name/x.gguf`).
        revision: Branch, tag or commit of a hub id.

    Raises:
        ConfigError: Nothing is there, or the hub cannot be reached or refuses.
        FormatError: What is there cannot be read as a model.
    """
    name = str(source)
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, name)
    if path.is_dir():
        return _from_folder(path, name, None)
    if is_hub_file(name):
        return _from_file(download_file(name, revision), name)
    if is_hub_id(name):
        return _from_folder(download(name, revision), name, revision)
    raise ConfigError(f"model {name!r}: no such file or folder, and no hub id (owner/name)")


def load_config_dict(folder: Path) -> dict[str, Any]:
    """Return config.json as it stands.

    Raises:
        FormatError: It is missing or no JSON object.
    """
    config = load_json(folder / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{folder / 'config.json'} holds no JSON object")
    return config


def _from_file(path: Path, name: str) -> ModelSource:
    folder = path.absolute().parent
    file = folder / path.name
    if path.suffix == ".gguf":
        return ModelSource(kind="gguf", name=name, folder=folder, weight_files=(file,))
    if path.suffix in PICKLE_SUFFIXES:
        load_config_dict(folder)
        return ModelSource(kind="pickle", name=name, folder=folder, weight_files=(file,))
    if path.suffix == ".safetensors":
        return ModelSource(kind=_safetensors_kind(folder), name=name, folder=folder, weight_files=(file,))
    raise FormatError(f"{path}: weights are read from .safetensors, .gguf or .bin files, or name the folder")


def _from_folder(folder: Path, name: str, revision: str | None) -> ModelSource:
    folder = folder.absolute()
    files = _weight_files(folder)
    if not files:
        gguf_files = sorted(folder.glob("*.gguf"))
        if len(gguf_files) == 1 and not (folder / "config.json").exists():
            return dataclasses.replace(_from_file(gguf_files[0], name), revision=revision)
        raise FormatError(_nothing_to_load(folder))
    kind = _safetensors_kind(folder)
    return ModelSource(kind=kind, name=name, folder=folder, weight_files=files, revision=revision)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    # The order of transformers, where a folder holds both.
    if (folder / SINGLE_FILE).exists():
        return (folder / SINGLE_FILE,)
    if (folder / INDEX_FILE).exists():
        files = tuple(folder / shard for shard in shard_names(folder / INDEX_FILE))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise FormatError(f"{folder} lacks {', '.join(missing[:3])}, which its {INDEX_FILE} names: copy them there")
        return files
    return ()


def _nothing_to_load(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return f"{folder} holds an adapter, not a model; its base model is named in adapter_config.json"
    others = sorted(path for path in folder.iterdir() if path.suffix in (*PICKLE_SUFFIXES, ".gguf", ".safetensors"))
    pickles = [path for path in others if path.suffix in PICKLE_SUFFIXES]
    if pickles:
        return (
            f"{folder} holds pickled weights only, and a pickle can run code. Name the file itself if you trust it "
            f"({pickles[0]}), or convert it to safetensors"
        )
    if others:
        return f"{folder} has no {SINGLE_FILE} or {INDEX_FILE}; name the file that you mean, such as {others[0]}"
    return f"{folder} holds no weights: no {SINGLE_FILE}, no {INDEX_FILE}, no .gguf file"


def _safetensors_kind(folder: Path) -> Literal["safetensors", "bnb4bit"]:
    quantization = load_config_dict(folder).get("quantization_config")
    if not quantization:
        return "safetensors"
    if not isinstance(quantization, dict):
        raise FormatError(f"{folder / 'config.json'}: quantization_config is no object")
    method = quantization.get("quant_method", "bitsandbytes" if "load_in_4bit" in quantization else "unknown")
    if method == "bitsandbytes" and quantization.get("load_in_4bit", quantization.get("_load_in_4bit")):
        return "bnb4bit"
    what = "bitsandbytes in 8 bits" if method == "bitsandbytes" else str(method)
    raise FormatError(
        f"{folder}: its weights are quantised by {what}; halfbyte reads 16- and 32-bit weights, bitsandbytes' 4-bit "
        "weights and GGUF. Get the original weights"
    )
