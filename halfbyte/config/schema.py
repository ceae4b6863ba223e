"""The JSON schema of run.yaml, with which an editor completes and checks options while they are typed.

The first line of a YAML file names it for most editors:

    # yaml-language-server: $schema=schema/run.schema.json
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from halfbyte.config.describe import REQUIRED, Option, list_options, sections

JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null"}
JSON_BOUNDS = {"minimum": "minimum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def make_schema() -> dict[str, Any]:
    """Return the schema of a run's YAML file."""
    properties: dict[str, Any] = {}
    for name, cls in sections().items():
        properties[name] = _object(cls.__doc__, [option for option in list_options() if option.section == name])
    top = _object("A run of halfbyte train", [option for option in list_options() if not option.section])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **top,
        "properties": {**properties, **top["properties"]},
    }


def _object(description: str, options: list[Option]) -> dict[str, Any]:
    properties = {}
    for option in options:
        properties[option.name] = _property(option)
        for alias in option.aliases:
            properties[alias] = {
                **_types(option.hint, option.bounds),
                "description": f"Another name for {option.name}.",
            }
    return {"type": "object", "description": description, "properties": properties, "additionalProperties": False}


def _property(option: Option) -> dict[str, Any]:
    schema = {**_types(option.hint, option.bounds), "description": option.doc}
    if option.default is not REQUIRED:
        schema["default"] = list(option.default) if isinstance(option.default, tuple) else option.default
    return schema


def _types(hint: Any, bounds: Mapping[str, float]) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_types(member, bounds) for member in args]}
    if origin is tuple:
        return {"type": "array", "items": _types(args[0], {})}
    if origin is dict:
        return {"type": "object", "additionalProperties": _types(args[1], {})}
    limits = {JSON_BOUNDS[key]: value for key, value in bounds.items()} if hint in (int, float) else {}
    return {"type": JSON_TYPES[hint], **limits}
