"""Models: where they come from, how they are loaded, and adapter files.

Layers above that may not know transformers find the types of its models and configurations here.
"""

from transformers import PretrainedConfig, PreTrainedModel

from halfbyte.models.adapter_config import read_adapter_config, spec_from_adapter_config
from halfbyte.models.adapter_files import load_adapter, save_adapter
from halfbyte.models.describe import load_config, load_tokenizer
from halfbyte.models.load import LoadedModel, load_model
from halfbyte.models.report import LoadReport
from halfbyte.models.run_folder import load_run
from halfbyte.models.source import ModelSource, resolve_source
from halfbyte.models.weights import LazyTensor, iter_weights

__all__ = [
    "LazyTensor",
    "LoadReport",
    "LoadedModel",
    "ModelSource",
    "PreTrainedModel",
    "PretrainedConfig",
    "iter_weights",
    "load_adapter",
    "load_config",
    "load_model",
    "load_run",
    "load_tokenizer",
    "read_adapter_config",
    "resolve_source",
    "save_adapter",
    "spec_from_adapter_config",
]
