"""Several adapters on one base, of which one is in use.

What an adapter is in a model are the modules that stand in the place of the base's own: layers with lora_A and lora_B,
modules trained whole, rows of tokens. An adapter that is not in use is a list of these modules, kept beside the model;
to use it, they are put back in their places. So switching moves no numbers, memory is that of the adapters alone, and
the model with one of them is what it would be had only that one been loaded: same layers, same vocabulary.

Names are PEFT's: the first adapter is "default" unless it is named.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch import nn

from halfbyte.errors import ConfigError
from halfbyte.nn.attach import ADAPTER_MODULES
from halfbyte.nn.convert import replace_module
from halfbyte.nn.spec import LoraSpec
from halfbyte.nn.vocabulary import set_vocabulary_size, vocabulary_size

DEFAULT_NAME = "default"
_SHELF_ATTRIBUTE = "halfbyte_adapters"
_CHANGES = itertools.count(1)


@dataclasses.dataclass(slots=True, eq=False)
class ShelvedAdapter:
    """One adapter of a model."""

    modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    """What stands in the place of the base's modules, by path."""
    spec: LoraSpec | None = None
    """What it was made of, where that is known."""


@dataclasses.dataclass(slots=True, eq=False)
class AdapterShelf:
    """The adapters of a model by name; the one in use has its modules in the model."""

    adapters: dict[str, ShelvedAdapter] = dataclasses.field(default_factory=dict)
    active: str | None = None
    num_changes: int = 0
    """Another number after each change: what was prepared for an adapter is for that number."""


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters, in the order in which they came."""
    return list(shelf_of(model).adapters)


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter in use; None for the base alone."""
    return shelf_of(model).active


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Use another adapter of a model; None for the base alone.

    Raises:
        ConfigError: There is none of that name.
    """
    shelf = shelf_of(model)
    if name is not None:
        _check_known(shelf, name)
    if name == shelf.active:
        return
    take_off_adapter(model)
    if name is None:
        return
    adapter = shelf.adapters[name]
    for path, module in adapter.modules.items():
        _follow_(module, model.get_submodule(path))
        replace_module(model, path, module)
    _say_vocabulary(model)
    shelf.active = name
    shelf.num_changes = next(_CHANGES)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter. Where it was in use, the first of the others is from then on, as in PEFT.

    Raises:
        ConfigError: There is none of that name.
    """
    shelf = shelf_of(model)
    _check_known(shelf, name)
    was_active = shelf.active == name
    if was_active:
        take_off_adapter(model)
    del shelf.adapters[name]
    if was_active and shelf.adapters:
        set_adapter(model, next(iter(shelf.adapters)))


def take_off_adapter(model: nn.Module) -> None:
    """Leave the base alone in the model; its adapters stay on the shelf."""
    shelf = shelf_of(model)
    if shelf.active is None:
        return
    adapter = shelf.adapters[shelf.active]
    adapter.modules = dict(_outermost(model))
    for path, module in adapter.modules.items():
        replace_module(model, path, _base_of(module))
    _say_vocabulary(model)
    shelf.active = None
    shelf.num_changes = next(_CHANGES)


def name_adapter(model: nn.Module, name: str, spec: LoraSpec | None = None) -> None:
    """Give the adapter that has just been attached to a model its name.

    Raises:
        ConfigError: The name is taken.
    """
    shelf = shelf_of(model, counts_unnamed=False)
    if name in shelf.adapters:
        raise ConfigError(f"the model has an adapter named {name!r} already; give another name, or delete that first")
    shelf.adapters[name] = ShelvedAdapter(spec=spec)
    shelf.active = name
    shelf.num_changes = next(_CHANGES)


def adapter_changes(model: nn.Module) -> int:
    """Return a number that is another one after each change of the adapter in use."""
    shelf: AdapterShelf | None = getattr(model, _SHELF_ATTRIBUTE, None)
    return 0 if shelf is None else shelf.num_changes


def shelf_of(model: nn.Module, *, counts_unnamed: bool = True) -> AdapterShelf:
    """Return the adapters of a model; one that was attached without a name is the default one."""
    shelf: AdapterShelf | None = getattr(model, _SHELF_ATTRIBUTE, None)
    if shelf is None:
        shelf = AdapterShelf()
        setattr(model, _SHELF_ATTRIBUTE, shelf)
    if counts_unnamed and shelf.active is None and any(isinstance(m, ADAPTER_MODULES) for m in model.modules()):
        shelf.adapters[DEFAULT_NAME] = ShelvedAdapter()
        shelf.active = DEFAULT_NAME
    return shelf


def _check_known(shelf: AdapterShelf, name: str) -> None:
    if name not in shelf.adapters:
        known = ", ".join(shelf.adapters) or "none"
        raise ConfigError(f"the model has no adapter named {name!r}; it has {known}")


def _outermost(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return path and module of each module of the adapter in use, without those inside them."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, ADAPTER_MODULES) and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, module))
    return found


def _base_of(module: nn.Module) -> nn.Module:
    while isinstance(module, ADAPTER_MODULES):
        module = module.unwrap()
    return module


def _follow_(module: Any, place: nn.Module) -> None:
    """Bring a module that comes off the shelf to where the model is now, and into its mode."""
    module.train(place.training)
    tensor = next(itertools.chain(place.parameters(), place.buffers()), None)
    device = getattr(place, "compute_device", None if tensor is None else tensor.device)
    if device is not None:
        module.to(device)


def _say_vocabulary(model: nn.Module) -> None:
    """Write the size of the vocabulary where it is another than before."""
    find = getattr(model, "get_input_embeddings", None)
    size = getattr(None if find is None else find(), "num_embeddings", None)
    if size is not None and size != vocabulary_size(model):
        set_vocabulary_size(model, size)
