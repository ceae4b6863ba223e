"""The kinds of rules of which tables are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from halfbyte.config.describe import find_option
from halfbyte.config.foreign.translation import Document, Outcome, Rule, Taken, Unneeded, Unsupported
from halfbyte.errors import ConfigError

BASE_IS_WHOLE = "under torchrun every rank has the whole base; it is not divided between cards"
UPLOAD = "upload the output folder when training is done"
EPOCH_ENDS = "at the end of each epoch, until train.{} says after how many steps"


def option(name: str) -> Rule:
    """The value is that of our option."""

    def rule(value: Any, document: Document) -> Outcome:
        return Taken({name: tuple(value) if isinstance(value, list) else value})

    return rule


def number(name: str) -> Rule:
    """The value is that of our option, and a number."""

    def rule(value: Any, document: Document) -> Outcome:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{value!r} is no number")
        return Taken({name: value})

    return rule


def whole(name: str) -> Rule:
    """The value is that of our option, and a whole number."""

    def rule(value: Any, document: Document) -> Outcome:
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
            raise ConfigError(f"{value!r} is no whole number")
        return Taken({name: int(value)})

    return rule


def switch(name: str) -> Rule:
    """The value is that of our option, true or false."""

    def rule(value: Any, document: Document) -> Outcome:
        return Taken({name: flag(value)})

    return rule


def choice(name: str, known: Mapping[str, str], *, others: str) -> Rule:
    """The value is another word for one of our option's."""

    def rule(value: Any, document: Document) -> Outcome:
        word = str(value)
        return Taken({name: known[word]}) if word in known else Unsupported(f"{word!r}: {others}")

    return rule


def literal(name: str) -> Rule:
    """The value is one of those that our option may have."""

    def rule(value: Any, document: Document) -> Outcome:
        known = find_option(name)
        assert known is not None
        if str(value) not in known.allowed.split(", "):
            return Unsupported(f"{value!r}; there are {known.allowed}")
        return Taken({name: value})

    return rule


def unneeded(reason: str) -> Rule:
    """Whatever the value, the run is the same without it."""
    return lambda value, document: Unneeded(reason)


def unsupported(reason: str) -> Rule:
    """Supported only where it is switched off."""

    def rule(value: Any, document: Document) -> Outcome:
        is_off = value is False or value == 0 or value in ("none", "false")
        return Unneeded("switched off") if is_off else Unsupported(reason)

    return rule


def only(allowed: Any, reason: str) -> Rule:
    """Only one value is as it is here."""

    def rule(value: Any, document: Document) -> Outcome:
        return Taken({}) if value == allowed else Unsupported(reason)

    return rule


def differs(difference: str) -> Rule:
    """It is done another way, which is said; {} stands for the value."""
    return lambda value, document: Taken({}, difference.format(value))


def same_as(key: str, reason: str) -> Rule:
    """The value may repeat that of another key."""

    def rule(value: Any, document: Document) -> Outcome:
        return Unneeded(f"the same as {key}") if value == document.get(key) else Unsupported(reason)

    return rule


def every(name: str) -> Rule:
    """The value is how many steps lie between two of something."""

    def rule(value: Any, document: Document) -> Outcome:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{value!r} is no number of steps")
        if value < 1:
            return Unsupported("a share of the steps; write their number")
        return Taken({f"train.{name}": int(value)})

    return rule


def strategy(name: str) -> Rule:
    """The value is when something is done; the option of that name has the steps."""

    def rule(value: Any, document: Document) -> Outcome:
        if value in ("epoch", "steps"):
            return Taken({})
        if value in (False, "no"):
            return Taken({}, EPOCH_ENDS.format(name))
        return Unsupported(f"{value!r}; there are epoch and steps")

    return rule


def dtype(name: str) -> Rule:
    """The value says whether products are computed in this type."""
    return lambda value, document: Taken({"model.dtype": name}) if flag(value) else Unneeded("switched off")


def held_out_share(value: Any, document: Document) -> Outcome:
    """The value is a share of the examples."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{value!r} is no number")
    if value >= 1:
        return Unsupported("a number of examples; write their share")
    return Taken({"data.held_out_fraction": float(value)})


def flag(value: Any) -> bool:
    """Return a value that is true or false.

    Raises:
        ConfigError: It is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r} is neither true nor false")
    return value


def names(value: Any) -> tuple[str, ...]:
    """Return one name, or several, as several."""
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)
