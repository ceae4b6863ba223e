"""The names that scripts written for transformers, peft, bitsandbytes, trl and datasets import.

    from halfbyte.hf import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LoraConfig, PeftModel,
                             SFTTrainer, TrainingArguments, get_peft_model, load_dataset,
                             prepare_model_for_kbit_training)

A script runs with only its import lines changed; argument names of older releases are understood. What we cannot
honour is an error that says so, never ignored. What we do differently is printed once, on a line that begins with
`halfbyte:`.

Names that need nothing from us (AutoTokenizer, TrainerCallback, GenerationConfig ...) are handed through from
transformers. Everything is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_OURS = {
    "AutoModelForCausalLM": "base_model",
    "BitsAndBytesConfig": "base_model",
    "prepare_model_for_kbit_training": "base_model",
    "LoraConfig": "peft_model",
    "PeftConfig": "peft_model",
    "PeftModel": "peft_model",
    "PeftModelForCausalLM": "peft_model",
    "AutoPeftModelForCausalLM": "peft_model",
    "TaskType": "peft_model",
    "get_peft_model": "peft_model",
    "TrainingArguments": "training",
    "SFTConfig": "training",
    "SFTTrainer": "training",
    "load_dataset": "datasets",
}
_FROM_TRANSFORMERS = (
    "AutoConfig",
    "AutoTokenizer",
    "EarlyStoppingCallback",
    "GenerationConfig",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStreamer",
    "TrainerCallback",
    "set_seed",
)
__all__ = [*_OURS, *_FROM_TRANSFORMERS]


def __getattr__(name: str) -> Any:
    if name in _OURS:
        return getattr(importlib.import_module(f"halfbyte.hf.{_OURS[name]}"), name)
    if name in _FROM_TRANSFORMERS:
        return getattr(importlib.import_module("transformers"), name)
    raise AttributeError(f"halfbyte.hf has no {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
