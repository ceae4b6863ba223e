"""What a model with adapters must be for trainers that we did not write: a `peft.PeftModel`.

transformers' Trainer and trl's trainers ask `isinstance(model, peft.PeftModel)`. By the answer they save the adapter
alone, look for the transformers model inside, and take the model with its adapter switched off for DPO's reference. So
our objects are of PEFT's class as well, where PEFT is installed: they bear the name and use none of the machinery. What
PEFT's class can do is either done here in our own way or refused.

DPO on an adapter that has learned something already compares with that adapter as it was at the start; trl asks for it
by `add_adapter("ref", ...)`. The copy is as large as the adapter, and takes its place while it is in use. For a fresh
adapter, which changes nothing yet, the base is the same and costs nothing, so no copy is made.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.hf.said import say
from halfbyte.nn import active_adapter, delete_adapter, iter_lora, iter_trainable, set_adapter
from halfbyte.nn.vocabulary import iter_token_rows
from halfbyte.train.checkpoint import restore_adapter_

OWN, REFERENCE = "default", "ref"
# What PEFT's class does beside that.
REFUSED = (
    "create_or_update_model_card",
    "get_layer_status",
    "get_model_status",
    "get_prompt",
    "get_prompt_embedding_to_save",
    "prepare_model_for_gradient_checkpointing",
    "set_requires_grad",
    "supports_lora_conversion",
)


class AdaptedModel(nn.Module):
    """The part of a model with adapters that other trainers speak to; its objects are of PEFT's class too."""

    base_model: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        ours: Any = cls
        return super().__new__(_with_peft(ours))

    def __init__(self, base_model: nn.Module, config: Any, adapter_name: str = OWN) -> None:
        # Not that of PEFT's class, which would put PEFT's layers into the model.
        nn.Module.__init__(self)
        self.base_model = base_model
        self.active_adapter = adapter_name
        self._configs = {adapter_name: config}
        self._reference: dict[str, torch.Tensor] = {}
        self._copied: str | None = None
        """The adapter that the reference is a copy of."""
        self._shows_copy = False

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters' options by name."""
        return self._configs

    @property
    def own_adapters(self) -> list[str]:
        """Names of the adapters, without the copy that is a reference."""
        return [name for name in self._configs if name != REFERENCE or self._copied is None]

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    @property
    def active_peft_config(self) -> Any:
        return self._configs[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return all(layer.adapter_enabled for _, layer in iter_lora(self.get_base_model()))

    @property
    def base_model_torch_dtype(self) -> torch.dtype:
        return self.get_base_model().dtype

    @property
    def modules_to_save(self) -> set[str]:
        return set(self.active_peft_config.modules_to_save or ())

    def get_base_model(self) -> PreTrainedModel:
        """Return the transformers model, whose layers hold the adapters."""
        return self.base_model.model

    def add_adapter(self, adapter_name: str, peft_config: Any = None, low_cpu_mem_usage: bool = False) -> None:
        """Keep a frozen copy of the adapter as it is now, under the name "ref".

        Of an adapter that has no effect yet no copy is kept; switching it off is the same.

        Raises:
            ConfigError: Another name, or one that is there already.
        """
        if adapter_name != REFERENCE:
            raise ConfigError(
                f"add_adapter: only {REFERENCE!r}, a copy of the adapter in use, can be added; others are loaded"
            )
        if adapter_name in self._configs:
            raise ConfigError(f"add_adapter: there is an adapter {adapter_name!r} already")
        model = self.get_base_model()
        is_plain = not self.modules_to_save and next(iter_token_rows(model), None) is None
        if is_plain and not any(bool(layer.lora_B.any()) for _, layer in iter_lora(model)):
            say("the reference is the base: the model with its adapter switched off")
            return
        self._reference = {name: parameter.detach().clone() for name, parameter in iter_trainable(model)}
        self._configs[REFERENCE] = self.active_peft_config
        self._copied = self.active_adapter
        say("the reference is the adapter as it is now, of which a copy is kept")

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use another adapter, or the copy of one ("ref").

        Raises:
            ConfigError: There is no adapter of this name.
        """
        if adapter_name not in self._configs:
            raise ConfigError(f"set_adapter: there is no adapter {adapter_name!r}, only {', '.join(self._configs)}")
        if adapter_name == self.active_adapter:
            return
        if self._shows_copy:
            self._swap_copy()
        is_copy = adapter_name == REFERENCE and self._copied is not None
        set_adapter(self.get_base_model(), self._copied if is_copy else adapter_name)
        if is_copy:
            self._swap_copy()
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; where it was in use, the first of the others is from then on.

        Raises:
            ConfigError: There is no adapter of this name, or it is one that the reference is a copy of, or that copy.
        """
        if self._copied is not None and adapter_name in (REFERENCE, self._copied):
            raise ConfigError(f"delete_adapter: {REFERENCE!r} is a copy of {self._copied!r}; both stay")
        model = self.get_base_model()
        delete_adapter(model, adapter_name)
        del self._configs[adapter_name]
        self.active_adapter = active_adapter(model) or OWN

    def _swap_copy(self) -> None:
        for name, parameter in iter_trainable(self.get_base_model()):
            # The parameters stay the objects that the optimizer knows; only their values take turns.
            parameter.data, self._reference[name] = self._reference[name], parameter.data
        self._shows_copy = not self._shows_copy

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str = OWN, **kwargs: Any) -> None:
        """Take the values of a saved adapter of the same layers and ranks, as a resumed run does.

        Raises:
            FormatError: The file is damaged, or is an adapter of other layers.
        """
        restore_adapter_(self.get_base_model(), Path(model_id))

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)


@functools.cache
def _with_peft(cls: Any) -> Any:
    """Return `cls` with PEFT's class behind it, where PEFT is installed; importing it waits for the first model."""
    if importlib.util.find_spec("peft") is None:
        return cls
    import peft

    if issubclass(cls, peft.PeftModel):
        return cls
    return type(cls.__name__, (cls, peft.PeftModel), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _refuse(name: str) -> Any:
    def refused(self: AdaptedModel, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"PeftModel.{name} is not supported here; save the adapter and load it with peft for that")

    refused.__name__ = name
    return refused


for _name in REFUSED:
    setattr(AdaptedModel, _name, _refuse(_name))
