"""halfbyte: fine-tune large language models with QLoRA, fast, in little memory, and exact about what it does.

    import halfbyte

    config = halfbyte.RunConfig(
        model=halfbyte.ModelSection(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        data=halfbyte.DataSection(train="tickets.jsonl"),
        output_dir="tuned",
    )
    halfbyte.run_training(config)

Each public name is imported when it is first asked for, so that `import halfbyte` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.config import DataSection as DataSection
    from halfbyte.config import LoraSection as LoraSection
    from halfbyte.config import ModelSection as ModelSection
    from halfbyte.config import QuantSection as QuantSection
    from halfbyte.config import RunConfig as RunConfig
    from halfbyte.config import TrainSection as TrainSection
    from halfbyte.config import load_config as load_config
    from halfbyte.data import build_renderer as build_renderer
    from halfbyte.data import load_examples as load_examples
    from halfbyte.data import prepare as prepare
    from halfbyte.data import split_held_out as split_held_out
    from halfbyte.distributed import join_world as join_world
    from halfbyte.errors import BackendError as BackendError
    from halfbyte.errors import ConfigError as ConfigError
    from halfbyte.errors import DataError as DataError
    from halfbyte.errors import FormatError as FormatError
    from halfbyte.errors import HalfbyteError as HalfbyteError
    from halfbyte.errors import PlanError as PlanError
    from halfbyte.export import export_bnb4bit as export_bnb4bit
    from halfbyte.export import merge_adapter as merge_adapter
    from halfbyte.models import load_adapter as load_adapter
    from halfbyte.models import load_model as load_model
    from halfbyte.models import load_run as load_run
    from halfbyte.models import save_adapter as save_adapter
    from halfbyte.models.generate import GenerationOptions as GenerationOptions
    from halfbyte.models.generate import generate_text as generate_text
    from halfbyte.nn import LoraSpec as LoraSpec
    from halfbyte.nn import active_adapter as active_adapter
    from halfbyte.nn import adapter_names as adapter_names
    from halfbyte.nn import adapters_disabled as adapters_disabled
    from halfbyte.nn import attach_adapters as attach_adapters
    from halfbyte.nn import delete_adapter as delete_adapter
    from halfbyte.nn import set_adapter as set_adapter
    from halfbyte.ops import dequantize_4bit as dequantize_4bit
    from halfbyte.ops import quantize_4bit as quantize_4bit
    from halfbyte.optim import build_optimizer as build_optimizer
    from halfbyte.quant import QuantizedTensor as QuantizedTensor
    from halfbyte.quant import QuantSpec as QuantSpec
    from halfbyte.train import evaluate_loss as evaluate_loss
    from halfbyte.train import run_training as run_training

__version__ = "0.1.0"

_MODULES = {
    "config": (
        "DataSection",
        "LoraSection",
        "ModelSection",
        "QuantSection",
        "RunConfig",
        "TrainSection",
        "load_config",
    ),
    "data": ("build_renderer", "load_examples", "prepare", "split_held_out"),
    "distributed": ("join_world",),
    "errors": ("BackendError", "ConfigError", "DataError", "FormatError", "HalfbyteError", "PlanError"),
    "export": ("export_bnb4bit", "merge_adapter"),
    "models": ("load_adapter", "load_model", "load_run", "save_adapter"),
    "models.generate": ("GenerationOptions", "generate_text"),
    "nn": (
        "LoraSpec",
        "active_adapter",
        "adapter_names",
        "adapters_disabled",
        "attach_adapters",
        "delete_adapter",
        "set_adapter",
    ),
    "ops": ("dequantize_4bit", "quantize_4bit"),
    "optim": ("build_optimizer",),
    "quant": ("QuantSpec", "QuantizedTensor"),
    "train": ("evaluate_loss", "run_training"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"halfbyte.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"halfbyte has no {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
