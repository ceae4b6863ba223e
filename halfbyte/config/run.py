"""RunConfig: everything that decides a run, the one place for options, defaults, docs and validation.

A run is six sections and an output folder. The value of an option is its default, unless the YAML file says
otherwise, unless the command line does (`halfbyte.config.load`). Each class validates itself, so that a RunConfig
made in Python is held to the same rules.
"""

from __future__ import annotations

import dataclasses

from halfbyte.config.data import DataSection
from halfbyte.config.lora import LoraSection
from halfbyte.config.memory import MemorySection
from halfbyte.config.model import ModelSection, QuantSection
from halfbyte.config.option import option
from halfbyte.config.train import TrainSection
from halfbyte.config.values import check_section
from halfbyte.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A run"""

    model: ModelSection
    data: DataSection
    quant: QuantSection = dataclasses.field(default_factory=QuantSection)
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)
    train: TrainSection = dataclasses.field(default_factory=TrainSection)
    memory: MemorySection = dataclasses.field(default_factory=MemorySection)
    output_dir: str | None = option(None, decides_result=False)
    """Folder for adapter, checkpoints, logs and summary. none: runs/<model>-<data>-<number>."""

    def __post_init__(self) -> None:
        check_section(self, "")
        if self.train.group_by_length and self.data.packing:
            raise ConfigError("train.group_by_length is for padded batches; set data.packing=false, or leave it out")
        if self.memory.streamed_blocks and not self.quant.enabled:
            raise ConfigError("memory.streamed_blocks needs weights in 4 bits; set quant.enabled=true")
        if self.memory.embedding_on_host and "embed_tokens" in self.lora.modules_to_save:
            raise ConfigError("memory.embedding_on_host is true, but lora.modules_to_save has the embedding trained")
        for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            if getattr(self.train, flag) and self.model.dtype not in ("auto", dtype):
                raise ConfigError(f"train.{flag} is true but model.dtype is {self.model.dtype}; set one of them")

    @property
    def compute_dtype(self) -> str:
        """model.dtype with train.bf16 and train.fp16 taken in: auto, bfloat16, float16 or float32."""
        if self.train.bf16:
            return "bfloat16"
        if self.train.fp16:
            return "float16"
        return self.model.dtype
