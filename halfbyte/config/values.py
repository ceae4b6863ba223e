"""Values against types: checking those that Python gives, reading those that a person writes.

The types in use are bool, int, float, str, Literal, tuple[X, ...], dict[str, X], and unions of these with or without
None. Text is always read by the type of its option and never by its looks. YAML's own guesses are therefore not
asked for: they take `2e-4` for text, `no` for a bool and `1e5`, a legal commit id, for a number.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from halfbyte.errors import ConfigError

NONE_WORDS = ("none", "null", "~", "")
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class NotOfTypeError(Exception):
    """Text or a value that is not of the type in question; the caller knows which option to name."""


def field_types(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with forward references resolved."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_section(section: Any, name: str) -> None:
    """Bring each field of a config dataclass into its declared form, or raise.

    Args:
        section: The frozen dataclass, called from its __post_init__.
        name: What its options are prefixed with in messages; empty for the top level.

    Raises:
        ConfigError: naming option, value and allowed values.
    """
    for field in dataclasses.fields(section):
        full_name = f"{name}.{field.name}" if name else field.name
        hint = field_types(type(section))[field.name]
        value = getattr(section, field.name)
        bounds = field.metadata.get("bounds", {})
        try:
            checked = check_value(value, hint)
            in_bounds = check_bounds(checked, bounds)
        except NotOfTypeError:
            in_bounds = False
        if not in_bounds:
            raise ConfigError(f"{full_name} is {value!r}; allowed: {allowed_values(hint, bounds)}")
        object.__setattr__(section, field.name, checked)


def check_value(value: Any, hint: Any) -> Any:
    """Return `value` in the form that `hint` declares: lists as tuples, whole numbers as floats where floats are meant.

    Raises:
        NotOfTypeError: where it is something else.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin in (Union, types.UnionType):
        return _first(lambda member: check_value(value, member), args)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(check_value(item, args[0]) for item in value)
    elif origin is dict:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: check_value(item, args[1]) for key, item in value.items()}
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is hint or (dataclasses.is_dataclass(hint) and isinstance(value, typing.cast(type, hint))):
        return value
    raise NotOfTypeError


def parse_text(text: str, hint: Any, *, quoted: bool = False) -> Any:
    """Read a value of type `hint` from what a person wrote.

    Args:
        text: Lists as `a,b`, dictionaries as `a=1,b=2`, nothing as `none`.
        hint: The type of the option.
        quoted: The text stood in quotes, so that `none` is a word.

    Raises:
        NotOfTypeError: where it cannot be read so.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    word = text.strip()
    if origin in (Union, types.UnionType):
        return _first(lambda member: parse_text(text, member, quoted=quoted), _none_first(args))
    if origin is Literal:
        return _first(lambda choice: _choice(word, choice), args)
    if origin is tuple:
        parts = [] if word in NONE_WORDS else word.split(",")
        return tuple(parse_text(part.strip(), args[0]) for part in parts)
    if origin is dict:
        return _parse_pairs(word, args[1])
    return _parse_plain(text, word, hint, quoted=quoted)


def allowed_values(hint: Any, bounds: Mapping[str, float] | None = None) -> str:
    """Say in words what `hint` and `bounds` allow."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return ", or ".join(allowed_values(member, bounds) for member in args if member is not types.NoneType) + (
            ", or none" if types.NoneType in args else ""
        )
    if origin is tuple:
        return f"a list, each {allowed_values(args[0])}"
    if origin is dict:
        return f"name=value pairs, each value {allowed_values(args[1])}"
    words = {"minimum": "at least", "above": "above", "below": "below"}
    limits = [f"{words[key]} {value:g}" for key, value in (bounds or {}).items()] if hint in (int, float) else []
    return ", ".join([TYPE_WORDS.get(hint, getattr(hint, "__name__", str(hint))), *limits])


def check_bounds(value: Any, bounds: Mapping[str, float]) -> bool:
    """Say whether a number is within its bounds; what is no number always is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    above, below = bounds.get("above", -math.inf), bounds.get("below", math.inf)
    return bounds.get("minimum", -math.inf) <= value and above < value < below


def _first(read: Callable[[Any], Any], members: tuple[Any, ...]) -> Any:
    for member in members:
        try:
            return read(member)
        except NotOfTypeError:
            continue
    raise NotOfTypeError


def _none_first(members: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted(members, key=lambda member: member is not types.NoneType))


def _choice(word: str, choice: Any) -> Any:
    if word != str(choice):
        raise NotOfTypeError
    return choice


def _parse_pairs(word: str, item_hint: Any) -> dict[str, Any]:
    pairs = {}
    for part in [] if word in NONE_WORDS else word.split(","):
        key, equals, value = part.rpartition("=")
        if not equals or not key.strip():
            raise NotOfTypeError
        pairs[key.strip()] = parse_text(value.strip(), item_hint)
    return pairs


def _parse_plain(text: str, word: str, hint: Any, *, quoted: bool) -> Any:
    if hint is str:
        return text
    if hint is types.NoneType:
        if word.lower() in NONE_WORDS and not quoted:
            return None
    elif hint is bool:
        if word.lower() in TRUE_WORDS + FALSE_WORDS:
            return word.lower() in TRUE_WORDS
    elif hint in (int, float):
        try:
            number = hint(word)
        except ValueError:
            raise NotOfTypeError from None
        if hint is int or math.isfinite(number):
            return number
    raise NotOfTypeError
