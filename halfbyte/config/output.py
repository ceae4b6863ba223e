"""The output folder: what it holds already, and what it may not."""

from __future__ import annotations

import os
import re
from pathlib import Path

from halfbyte.errors import ConfigError

RUNS_FOLDER = Path("runs")
RUN_FILE, SUMMARY_FILE = "run.yaml", "summary.json"
RUN_FILES = ("adapter_config.json", "adapter_model.safetensors", RUN_FILE, SUMMARY_FILE)
REPORT_FILE = "report.html"
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def refuse_used_folder(folder: Path) -> Path:
    """Return `folder` unless a model or a run lies there.

    Raises:
        ConfigError: One does, or it is a file.
    """
    if holds_run(refuse_model_folder(folder)):
        raise ConfigError(f"{folder} holds a run; name another folder")
    return folder


def refuse_model_folder(folder: Path) -> Path:
    """Return `folder` unless a model lies there.

    Raises:
        ConfigError: One does, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder to write to")
    if any((folder / name).exists() for name in MODEL_FILES):
        raise ConfigError(f"{folder} already holds a model; name another folder to write to")
    return folder


def holds_run(folder: Path) -> bool:
    """Say whether a run has left anything in `folder`."""
    return any((folder / name).exists() for name in RUN_FILES) or last_checkpoint(folder) is not None


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint-<steps> folder with the most steps, or None."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


def save_text(text: str, path: Path) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def source_name(source: str) -> str:
    """Return what a person calls a model or data set: a hub id as it is, of a path the last part."""
    is_path = source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1 or Path(source).exists()
    return Path(source.rstrip("/\\")).name or source if is_path else source


def folder_stem(source: str) -> str:
    """Return the last part of a path or hub id, without a file's ending, in lower case and fit for a file name."""
    name = Path(source.rstrip("/\\") or source).name
    name = re.sub(r"\.(jsonl|json|csv|tsv|parquet|txt|gguf|safetensors)$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "run"
