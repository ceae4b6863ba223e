"""The list of options, read from the config classes: name, type, default, bounds, aliases, and doc.

Python keeps no docstring of a field, so the docs are taken from the source: the string below each annotated name.
Help text, editor schema and command line are all made from this list, and cannot disagree with it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from halfbyte.config.run import RunConfig
from halfbyte.config.values import allowed_values, field_types

REQUIRED = dataclasses.MISSING
# From this many letters on, a part of a name stands for it: epochs for num_train_epochs.
SHORTEST_PART = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Option:
    """One option."""

    section: str
    """Empty at the top level."""
    name: str
    hint: Any
    default: Any
    """REQUIRED where there is none."""
    doc: str
    aliases: tuple[str, ...]
    bounds: Mapping[str, float]
    decides_result: bool

    @property
    def full_name(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def allowed(self) -> str:
        return allowed_values(self.hint, self.bounds)

    @property
    def default_text(self) -> str:
        """The default as one would type it, or "required"."""
        value = self.default
        if value is REQUIRED:
            return "required"
        if value is None or value in ((), {}):
            return "none"
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else str(value)


def sections() -> dict[str, Any]:
    """Return the class of each section by its name, in order."""
    return {name: hint for name, hint in field_types(RunConfig).items() if dataclasses.is_dataclass(hint)}


@functools.cache
def list_options() -> tuple[Option, ...]:
    """Return all options, section by section, those of the top level last."""
    options = [option for name, cls in sections().items() for option in _options_of(cls, name)]
    return (*options, *(option for option in _options_of(RunConfig, "") if option.name not in sections()))


@functools.cache
def find_option(full_name: str) -> Option | None:
    """Return the option called `full_name`, or of which it is an alias."""
    section, _, name = full_name.rpartition(".")
    for option in list_options():
        if option.section == section and name in (option.name, *option.aliases):
            return option
    return None


def nearest_option(full_name: str) -> str | None:
    """Return the option that a misspelt or misplaced name was probably meant to be, or None."""
    section, _, name = full_name.rpartition(".")
    options = sorted(list_options(), key=lambda option: option.section != section)
    for option in options:
        if name in (option.name, *option.aliases):
            return option.full_name
    for option in options:
        if len(name) >= SHORTEST_PART and name in option.name:
            return option.full_name
    by_full_name = {option.full_name: option.full_name for option in options}
    by_name = {word: option.full_name for option in reversed(options) for word in (option.name, *option.aliases)}
    for wanted, known in ((full_name, by_full_name), (name, by_name)):
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
        if close:
            return known[close[0]]
    return None


def _options_of(cls: Any, section: str) -> list[Option]:
    docs = _field_docs(cls)
    options = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        options.append(
            Option(
                section=section,
                name=field.name,
                hint=field_types(cls)[field.name],
                default=default,
                doc=docs.get(field.name, ""),
                aliases=field.metadata.get("aliases", ()),
                bounds=field.metadata.get("bounds", {}),
                decides_result=field.metadata.get("decides_result", True),
            )
        )
    return options


def _field_docs(cls: type) -> dict[str, str]:
    """Return the string that stands below each field in the source of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node, below in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[node.target.id] = " ".join(below.value.value.split())
    return docs
