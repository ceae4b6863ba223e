"""adapter_config.json: PEFT's description of an adapter, in its words and in ours.

We write only fields that every PEFT since 0.7 knows, because older releases refuse a file with a field they have not
heard of. Layers are written as plain names where names mean exactly the layers that have adapters, otherwise as full
paths, which every release takes literally.

We read what any PEFT wrote, and refuse by name whatever would make the adapter something else than B A beside a linear
layer: ignoring such a field would load the adapter and change what it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.errors import FormatError
from halfbyte.models.adapter_patterns import check_pattern
from halfbyte.models.adapter_tokens import listed_tokens
from halfbyte.models.described import load_json
from halfbyte.nn import LoraSpec
from halfbyte.nn.attach import AdapterModules
from halfbyte.nn.spec import ALL_LINEAR, INPUT_EMBEDDING

CONFIG_FILE = "adapter_config.json"
# Fields that change what an adapter computes, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# Ways of initialising that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ) alter it.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Return what adapter_config.json says.

    Args:
        path: The adapter's folder, or a file in it.

    Raises:
        FormatError: The file is missing, no JSON object, or describes something else than LoRA.
    """
    folder = path if path.is_dir() else path.parent
    values = load_json(folder / CONFIG_FILE)
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        found = values.get("peft_type") if isinstance(values, dict) else None
        raise FormatError(f"{folder / CONFIG_FILE}: peft_type is {found!r}; only LORA adapters are known")
    for name, neutral in _NEUTRAL.items():
        if name in values and values[name] not in neutral:
            raise FormatError(f"{folder / CONFIG_FILE}: {name} is {values[name]!r}, which is not supported")
    if values.get("init_lora_weights") not in _HARMLESS_INITS:
        raise FormatError(
            f"{folder / CONFIG_FILE}: init_lora_weights is {values['init_lora_weights']!r}, which alters the base "
            "model; convert the adapter to plain LoRA with PEFT first"
        )
    return values


def spec_from_adapter_config(values: Mapping[str, Any]) -> LoraSpec:
    """Return an adapter's description in our words.

    Raises:
        FormatError: A field is missing or has a value that cannot be.
    """
    try:
        _check_patterns(values)
        targets = values["target_modules"]
        return LoraSpec(
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            dropout=float(values.get("lora_dropout") or 0.0),
            rslora=bool(values.get("use_rslora")),
            dora=bool(values.get("use_dora")),
            targets=_names(targets),
            exclude=_names(values.get("exclude_modules")),
            rank_pattern=dict(values.get("rank_pattern") or {}),
            alpha_pattern=dict(values.get("alpha_pattern") or {}),
            layers_to_transform=_layers(values.get("layers_to_transform")),
            layers_pattern=_names(values.get("layers_pattern")) or None,
            modules_to_save=_texts(values.get("modules_to_save") or ()),
            trainable_tokens=_tokens(values.get("trainable_token_indices")),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise FormatError(f"{CONFIG_FILE} lacks a field, or one has an impossible value: {error!r}") from error


def make_adapter_config(
    spec: LoraSpec, *, base_model: str, modules: AdapterModules, model: nn.Module, revision: str | None = None
) -> dict[str, Any]:
    """Return what adapter_config.json shall say.

    Args:
        spec: What the adapters were made of.
        base_model: Path or hub id of the base.
        modules: What they consist of.
        model: The model that has them.
        revision: Of the base, where it is a hub id.
    """
    paths = sorted(modules.lora)
    names = _targets(spec, paths, modules.linears)
    by_path = names == paths
    rows = [(path, wrapper.table.token_ids) for path, wrapper in modules.rows.items()]
    # Unknown to a PEFT before 0.15, which is therefore not to see it without need.
    tokens = {"trainable_token_indices": listed_tokens(model, rows)} if rows else {}
    return tokens | {
        "alpha_pattern": {key: _whole(value) for key, value in spec.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None if by_path else _listed(spec.layers_pattern),
        "layers_to_transform": None if by_path else _listed(spec.layers_to_transform),
        "lora_alpha": _whole(spec.alpha),
        "lora_dropout": spec.dropout,
        "modules_to_save": list(spec.modules_to_save) or None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "revision": revision,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
        "use_rslora": spec.rslora,
        # Not before PEFT 0.9, which is the first that can load it.
        **({"use_dora": True} if spec.dora else {}),
    }


def adapter_config_text(values: Mapping[str, Any]) -> str:
    """Return the text of the file."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _targets(spec: LoraSpec, paths: list[str], linears: Iterable[str]) -> str | list[str]:
    if isinstance(spec.targets, str) and spec.targets != ALL_LINEAR and not spec.exclude:
        return spec.targets
    if spec.exclude:
        return paths
    names = sorted({path.rpartition(".")[2] for path in paths} if spec.targets == ALL_LINEAR else spec.targets)
    if spec.layers_to_transform is not None:
        return names
    matched = {path for path in linears for name in names if path == name or path.endswith(f".{name}")}
    return names if matched == set(paths) else paths


def _names(value: Any) -> str | tuple[str, ...]:
    if value is None:
        return ()
    return value if isinstance(value, str) else tuple(sorted(_texts(value)))


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{value!r} is no list of names")
    return tuple(value)


def _check_patterns(values: Mapping[str, Any]) -> None:
    """Refuse fields that are used as regular expressions and are none, or may take forever."""
    for field in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = values.get(field) or ()
        for pattern in [value] if isinstance(value, str) else value:
            if isinstance(pattern, str):
                check_pattern(pattern, where=f"{CONFIG_FILE}: {field}")


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    if not value:
        return {}
    by_name = value if isinstance(value, dict) else {INPUT_EMBEDDING: value}
    return {name: tuple(int(number) for number in ids) for name, ids in by_name.items()}


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    return (int(value),) if isinstance(value, int) else tuple(int(number) for number in value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _whole(value: float) -> float | int:
    """PEFT's own files hold whole numbers as such."""
    return int(value) if float(value).is_integer() else value
