"""Options: RunConfig and its sections, and reading them from files and command lines. No torch in here."""

from __future__ import annotations

from halfbyte.config.data import DataSection
from halfbyte.config.load import load_config, save_run_config, to_yaml
from halfbyte.config.lora import LoraSection
from halfbyte.config.memory import MemorySection
from halfbyte.config.model import ModelSection, QuantSection
from halfbyte.config.output import holds_run, last_checkpoint
from halfbyte.config.resolve import resolve_output_dir
from halfbyte.config.run import RunConfig
from halfbyte.config.train import TrainSection

__all__ = [
    "DataSection",
    "LoraSection",
    "MemorySection",
    "ModelSection",
    "QuantSection",
    "RunConfig",
    "TrainSection",
    "holds_run",
    "last_checkpoint",
    "load_config",
    "resolve_output_dir",
    "save_run_config",
    "to_yaml",
]
