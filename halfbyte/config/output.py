"""The output folder: its default name, and what it may not hold already."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from halfbyte.config.run import RunConfig
from halfbyte.errors import ConfigError

RUNS_FOLDER = Path("runs")
RUN_FILE, SUMMARY_FILE = "run.yaml", "summary.json"
RUN_FILES = ("adapter_config.json", "adapter_model.safetensors", RUN_FILE, SUMMARY_FILE)
REPORT_FILE = "report.html"
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def resolve_output_dir(config: RunConfig) -> RunConfig:
    """Give the run a folder and make sure that it may write there. Nothing is created.

    Without output_dir it is runs/<model>-<data>-<number>, the first number that is free; with train.resume the last
    one that is taken.

    Returns:
        The config with output_dir set.

    Raises:
        ConfigError: The folder holds a run, a model or is a file; or there is nothing to resume.
    """
    folder = refuse_model_folder(Path(config.output_dir) if config.output_dir else _default_folder(config))
    if config.train.resume:
        if last_checkpoint(folder) is None:
            raise ConfigError(f"train.resume: {folder} holds no checkpoint; leave --resume out to start a run there")
    elif holds_run(folder) and not config.train.overwrite:
        raise ConfigError(
            f"{folder} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or name another folder with --output"
        )
    return dataclasses.replace(config, output_dir=str(folder))


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


def _default_folder(config: RunConfig) -> Path:
    stem = f"{_stem(config.model.path)}-{_stem(config.data.train)}"
    numbers = [
        int(path.name.removeprefix(f"{stem}-"))
        for path in RUNS_FOLDER.glob("*")
        if re.fullmatch(re.escape(stem) + r"-\d+", path.name)
    ]
    if config.train.resume and numbers:
        return RUNS_FOLDER / f"{stem}-{max(numbers)}"
    return RUNS_FOLDER / f"{stem}-{max(numbers, default=0) + 1}"


def source_name(source: str) -> str:
    """Return what a person calls a model or data set: a hub id as it is, of a path the last part."""
    is_path = source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1 or Path(source).exists()
    return Path(source.rstrip("/\\")).name or source if is_path else source


def _stem(source: str) -> str:
    """Return the last part of a path or hub id, without a file's ending, in lower case and fit for a file name."""
    name = Path(source.rstrip("/\\") or source).name
    name = re.sub(r"\.(jsonl|json|csv|tsv|parquet|txt|gguf|safetensors)$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "run"
