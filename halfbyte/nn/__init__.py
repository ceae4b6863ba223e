"""Modules: a frozen 4-bit linear layer, an adapter beside it, and their attachment to any model."""

from halfbyte.nn.adapter_shelf import active_adapter, adapter_names, delete_adapter, set_adapter
from halfbyte.nn.attach import AdapterReport, adapters_disabled, attach_adapters, iter_lora, iter_trainable
from halfbyte.nn.convert import quantize_linears_
from halfbyte.nn.inference import expanded_for_inference, expanded_nbytes
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.saved_module import SavedModule
from halfbyte.nn.spec import LoraSpec

__all__ = [
    "AdapterReport",
    "Linear4bit",
    "LoraLinear",
    "LoraSpec",
    "SavedModule",
    "active_adapter",
    "adapter_names",
    "adapters_disabled",
    "attach_adapters",
    "delete_adapter",
    "expanded_for_inference",
    "expanded_nbytes",
    "iter_lora",
    "iter_trainable",
    "quantize_linears_",
    "set_adapter",
]
