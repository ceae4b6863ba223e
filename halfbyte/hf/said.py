"""What the recipe's names say aloud, and how they refuse."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from halfbyte.errors import ConfigError


def say(message: str) -> None:
    """Print one line about something that differs from what the script's author may expect."""
    print(f"halfbyte: {message}", file=sys.stderr, flush=True)


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ConfigError for the first argument of `given` that is not in `known`, with the nearest one that is."""
    import difflib

    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}: halfbyte does not know the argument {name!r} and ignores none{hint}")


def refuse_unless_default(where: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise a ConfigError for the first argument that is set to something other than the only value we honour."""
    for name, only in defaults.items():
        if name in given and given[name] != only and given[name] is not None:
            raise ConfigError(f"{where}: {name}={given[name]!r} cannot be honoured; leave it out ({name}={only!r})")
