"""Which modules of a model a LoraSpec means, by PEFT's rules, and what to say when it means none.

A path such as model.layers.3.self_attn.q_proj is a target when

- targets is "all-linear" and the module is a linear layer other than the output head;
- targets is a regular expression that matches the whole path;
- targets holds the path, or a name that the path ends with after a dot (and the layer number passes
  layers_to_transform, counted in the list called layers_pattern or else in the first number of the path);

unless the path is excluded, by the same name or regular-expression rules, or lies in a module of modules_to_save.
rank_pattern and alpha_pattern hold regular expressions for the end of a path; the first that matches counts.

Stricter than PEFT in one respect: a name, pattern or layer number that matches nothing is an error, because it is a
misspelling nine times out of ten and PEFT's silence costs a training run.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from halfbyte.errors import ConfigError
from halfbyte.nn.convert import output_head
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.spec import ALL_LINEAR, LoraSpec

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One layer that gets an adapter."""

    path: str
    rank: int
    alpha: float


def find_targets(model: nn.Module, spec: LoraSpec) -> list[Target]:
    """Return the layers that `spec` means, in the model's order.

    Raises:
        ConfigError: Nothing matches, part of the spec matches nothing, or a match is no linear layer.
    """
    modules = dict(model.named_modules())
    wanted = _wanted_paths(model, modules, spec)
    paths = [path for path in wanted if not _is_excluded(path, spec)]
    if not paths:
        raise ConfigError(f"{_describe(spec)} matches no layer that is left to train. {describe_linears(model)}")
    for path in paths:
        _check_linear(path, modules[path], spec)
    _check_all_used(modules, wanted, paths, spec)
    return [_make_target(path, spec) for path in paths]


def find_saved(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Return the paths of the modules that `spec` wants trained whole."""
    paths = [path for path, _ in model.named_modules() if path and _ends_with_name(path, spec.modules_to_save)]
    for name in spec.modules_to_save:
        if not any(_ends_with_name(path, (name,)) for path in paths):
            raise ConfigError(
                f"lora.modules_to_save names {name!r}, which the model does not have. It has: "
                f"{', '.join(_counted(path for path, _ in model.named_modules() if path))}"
            )
    return paths


def describe_linears(model: nn.Module) -> str:
    """Return a sentence that lists the linear layers of a model by name and count."""
    linears = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Linear4bit))]
    if any(is_conv1d(module) for module in model.modules()):
        return "Its layers are Conv1D (as in GPT-2), which halfbyte does not adapt: only nn.Linear layers can be."
    return f"The model has these linear layers: {', '.join(_counted(linears)) or 'none'}."


def is_conv1d(module: nn.Module) -> bool:
    """Say whether this is transformers' Conv1D, a linear layer stored transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _wanted_paths(model: nn.Module, modules: Mapping[str, nn.Module], spec: LoraSpec) -> list[str]:
    if spec.targets == ALL_LINEAR:
        conv1d = [path for path, module in modules.items() if is_conv1d(module)]
        if conv1d:
            raise ConfigError(
                f"lora.targets is all-linear, but {conv1d[0]} is one of {len(conv1d)} Conv1D layers "
                "(as in GPT-2), which halfbyte does not adapt; name nn.Linear layers instead"
            )
        head = output_head(model)
        linears = [p for p, m in modules.items() if isinstance(m, (nn.Linear, Linear4bit)) and m is not head]
        return [path for path in linears if _is_in_layers(path, spec)]
    if isinstance(spec.targets, str):
        return [path for path in modules if path and re.fullmatch(spec.targets, path)]
    return [path for path in modules if path in spec.targets or _is_named(path, spec)]


def _is_named(path: str, spec: LoraSpec) -> bool:
    return _ends_with_name(path, spec.targets) and _is_in_layers(path, spec)


def _ends_with_name(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _is_in_layers(path: str, spec: LoraSpec) -> bool:
    if not spec.layers_to_transform:
        return True
    return _layer_number(path, spec) in spec.layers_to_transform


def _layer_number(path: str, spec: LoraSpec) -> int | None:
    patterns = (spec.layers_pattern,) if isinstance(spec.layers_pattern, str) else spec.layers_pattern
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns or ()] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(e, path) for e in expressions) if match), None)
    return int(found.group(1)) if found else None


def _is_excluded(path: str, spec: LoraSpec) -> bool:
    if isinstance(spec.exclude, str):
        if spec.exclude and re.fullmatch(spec.exclude, path):
            return True
    elif _ends_with_name(path, spec.exclude):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in spec.modules_to_save)


def _check_linear(path: str, module: nn.Module, spec: LoraSpec) -> None:
    if is_conv1d(module):
        raise ConfigError(
            f"{_describe(spec)} matches {path}, a Conv1D layer (as in GPT-2); only nn.Linear layers can be adapted"
        )
    if not isinstance(module, (nn.Linear, Linear4bit)):
        raise ConfigError(
            f"{_describe(spec)} matches {path}, which is a {type(module).__name__}; only linear layers can be adapted"
        )


def _check_all_used(modules: Mapping[str, nn.Module], wanted: list[str], paths: list[str], spec: LoraSpec) -> None:
    if not isinstance(spec.targets, str):
        for name in spec.targets:
            if not any(_ends_with_name(path, (name,)) for path in wanted):
                linears = (p for p, m in modules.items() if isinstance(m, (nn.Linear, Linear4bit)))
                raise ConfigError(
                    f"lora.targets names {name!r}, which matches no layer. The model has these linear "
                    f"layers: {', '.join(_counted(linears))}."
                )
    if not isinstance(spec.exclude, str):
        for name in spec.exclude:
            if not any(_ends_with_name(path, (name,)) for path in modules):
                raise ConfigError(f"lora.exclude names {name!r}, which matches no module of the model")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, field):
            if not any(_first_match({pattern: 1}, path) for path in paths):
                raise ConfigError(
                    f"lora.{field} has the key {pattern!r}, which matches none of the layers that get "
                    f"an adapter: {', '.join(_counted(paths))}"
                )
    for number in spec.layers_to_transform or ():
        if not any(_layer_number(path, spec) == number for path in paths):
            raise ConfigError(f"lora.layers_to_transform has {number}, but no layer of that number gets an adapter")


def _make_target(path: str, spec: LoraSpec) -> Target:
    rank = _first_match(spec.rank_pattern, path) or spec.rank
    alpha = _first_match(spec.alpha_pattern, path)
    return Target(path=path, rank=rank, alpha=spec.alpha if alpha is None else alpha)


def _first_match(patterns: Mapping[str, Number], path: str) -> Number | None:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), None)


def _describe(spec: LoraSpec) -> str:
    targets = spec.targets if isinstance(spec.targets, str) else ", ".join(spec.targets)
    limits = [
        f"{name} {value}"
        for name in ("exclude", "layers_to_transform", "layers_pattern", "modules_to_save")
        if (value := getattr(spec, name))
    ]
    return f"lora.targets ({targets}{'; ' if limits else ''}{'; '.join(limits)})"


def _counted(paths: Iterable[str]) -> list[str]:
    counts = collections.Counter(path.rpartition(".")[2] for path in paths)
    return [f"{name} x {count}" for name, count in counts.items() if not name.isdigit()]
