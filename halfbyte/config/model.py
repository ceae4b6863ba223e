"""Options of the base model: where it comes from, and how it is held."""

from __future__ import annotations

import dataclasses
from typing import Literal

from halfbyte.config.option import option
from halfbyte.config.values import check_section


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """The base model"""

    path: str
    """Hub id, folder, or GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What products are computed in. auto: bfloat16 where the device is fast at it, else float16 on a GPU and float32
    on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... auto: the first GPU, else the CPU."""
    attention: str | None = None
    """Attention implementation by its transformers name. none: ours, which keeps packed examples apart."""
    allow_16bit_experts: bool = False
    """Accept a model whose expert weights are no linear layers and would stay in 16 bits."""

    added_tokens: Literal["template"] | tuple[str, ...] = option((), aliases=("special_tokens",))
    """Special tokens that the tokenizer gets and the vocabulary grows by (<|im_start|>,<|im_end|>); their rows of
    embedding and head are trained. template: the markers of the chat template that the tokenizer would split."""
    pad_vocabulary_to: int = option(1, minimum=1, aliases=("pad_to_multiple_of",))
    """A vocabulary that grows becomes a multiple of this where matrices are written whole: in lora.modules_to_save and
    merged models."""

    def __post_init__(self) -> None:
        check_section(self, "model")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantSection:
    """The 4-bit form of the frozen weights"""

    enabled: bool = True
    """Keep the frozen linear layers in 4 bits. false: plain 16-bit LoRA."""
    codebook: Literal["nf4", "fp4"] = "nf4"
    """The 16 values that a code stands for."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Elements that share one scale."""
    double_quant: bool = True
    """Keep the scales in 8 bits as well."""

    def __post_init__(self) -> None:
        check_section(self, "quant")
