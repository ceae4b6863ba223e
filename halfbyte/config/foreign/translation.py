"""What becomes of each key of another trainer's YAML file: taken, not needed here, or not supported.

A trainer is described by a table of rules, key by key, and by the defaults that its keys have when they are left out:
those decide a run as much as what is written, and are translated likewise. A rule sees one key's value and the whole
file. No key passes in silence: one without a rule is not supported, except where it is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from halfbyte.config.describe import find_option, list_options
from halfbyte.config.load import ConfigDumper, compose_yaml, entries_of, make_config
from halfbyte.config.run import RunConfig
from halfbyte.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """The key is translated."""

    values: Mapping[str, Any]
    """Our options by full name; empty where ours do so anyway."""
    difference: str = ""
    """What is not quite the same, or what remains to be done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unneeded:
    """Nothing is lost by leaving the key out."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Unsupported:
    """The run would be another one without the key."""

    reason: str


Outcome = Taken | Unneeded | Unsupported


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A YAML file: values and lines by key, those of nested mappings by dotted key."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    def get(self, key: str) -> Any:
        """Return a value, None where the key is left out or empty."""
        return self.values.get(key)


Rule = Callable[[Any, Document], Outcome]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """How another trainer's files are read."""

    name: str
    rules: Mapping[str, Rule]
    """By dotted key. A key with rules below it is read entry by entry."""
    families: Mapping[str, Rule]
    """By the beginning of the key, for keys that are alike."""
    defaults: Mapping[str, Any]
    """What keys are when they are left out, where ours differ."""
    required: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """What there is to say about one key."""

    key: str
    line: int | None
    """None for a default."""
    outcome: Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Translation:
    """A translated file."""

    document: Document
    trainer: str
    said: tuple[Said, ...]
    values: Mapping[str, Any]
    """Our options by full name."""

    @property
    def unsupported(self) -> list[Said]:
        return [one for one in self.said if isinstance(one.outcome, Unsupported)]

    def make_config(self) -> RunConfig:
        """Return the run that is described.

        Raises:
            ConfigError: Our own rules do not allow it.
        """
        # Without examples it is still to be checked, and to be completed by hand.
        return make_config({"data.train": "?", **self.values})

    def report(self) -> list[str]:
        """Return a line for each key, in the order of the file."""
        return [f"{self._where(one)}{one.key}{_describe(one.outcome)}" for one in self.said]

    def to_yaml(self) -> str:
        """Return run.yaml, each option with the key that it comes from."""
        origins = {name: one for one in self.said if isinstance(one.outcome, Taken) for name in one.outcome.values}
        lines = [f"# Translated from {self.document.path.name} ({self.trainer})."]
        section = ""
        for option in list_options():
            if option.full_name not in self.values:
                continue
            if option.section != section:
                section = option.section
                lines += [f"{section}:"] if section else []
            one = origins[option.full_name]
            origin = f"{one.key}, line {one.line}" if one.line else f"default of {one.key}"
            lines += _dump(option.name, self.values[option.full_name], indent="  " * bool(section), origin=origin)
        for one in self.unsupported:
            line = f", line {one.line}" if one.line else ""
            lines.append(f"# Left out: {one.key}{line}{_describe(one.outcome)}")
        return "\n".join(lines) + "\n"

    def _where(self, one: Said) -> str:
        return f"{self.document.path}:{one.line}: " if one.line else f"{self.document.path}: (left out) "


def read_document(path: Path) -> Document:
    """Return a YAML file's values and lines.

    Raises:
        ConfigError: It is missing, or no YAML.
    """
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}

    def enter(node: yaml.MappingNode, prefix: str) -> None:
        for (key, inner, _), (name, _) in zip(entries_of(node, path), node.value, strict=True):
            values[prefix + key] = _plain(inner)
            lines[prefix + key] = name.start_mark.line + 1
            if isinstance(inner, yaml.MappingNode):
                enter(inner, f"{prefix}{key}.")
            elif isinstance(inner, yaml.SequenceNode):
                for number, item in enumerate(inner.value):
                    if isinstance(item, yaml.MappingNode):
                        enter(item, f"{prefix}{key}[{number}].")

    root = compose_yaml(path, expected="keys of another trainer")
    enter(root, "")
    return Document(path, values, lines)


def translate(document: Document, trainer: Trainer) -> Translation:
    """Return what becomes of every key of a file.

    Raises:
        ConfigError: A key is missing without which there is no run, or a value is not what it may be.
    """
    for key in trainer.required:
        if document.get(key) is None:
            raise ConfigError(f"{document.path}: {key} is not set, and no run goes without it")
    said = list(_read(document, trainer, ""))
    written = {one.key for one in said}
    said += [
        Said(key, None, trainer.rules[key](value, document))
        for key, value in trainer.defaults.items()
        if key not in written or document.get(key) is None
    ]
    values: dict[str, Any] = {}
    for one in said:
        if isinstance(one.outcome, Taken):
            for name, value in one.outcome.values.items():
                assert find_option(name) is not None, name
                # Loggers add up; nothing else comes from two keys at once.
                values[name] = (*values.get(name, ()), *value) if name == "train.report_to" else value
    return Translation(document, trainer.name, tuple(said), values)


def _read(document: Document, trainer: Trainer, prefix: str) -> Iterator[Said]:
    """Yield what becomes of the keys directly below a prefix."""
    for key, value in document.values.items():
        if not key.startswith(prefix) or "." in key[len(prefix) :] or "[" in key:
            continue
        if isinstance(value, dict) and any(rule.startswith(f"{key}.") for rule in trainer.rules):
            yield from _read(document, trainer, f"{key}.")
            continue
        yield Said(key, document.lines[key], _outcome(key, value, document, trainer))


def _outcome(key: str, value: Any, document: Document, trainer: Trainer) -> Outcome:
    if value is None or value in ("", [], {}):
        return Unneeded("empty")
    rule = trainer.rules.get(key)
    if rule is None:
        rule = next((rule for start, rule in trainer.families.items() if key.startswith(start)), None)
    if rule is None:
        return Unsupported("not known here")
    try:
        return rule(value, document)
    except ConfigError as error:
        raise ConfigError(f"{document.path}:{document.lines[key]}: {error}") from None


def _plain(node: yaml.Node) -> Any:
    """Return what a node means to PyYAML, but numbers such as 2e-4, which it takes for text, as numbers."""
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
    if isinstance(node, yaml.ScalarNode) and isinstance(value, str) and node.style is None:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _dump(name: str, value: Any, *, indent: str, origin: str) -> list[str]:
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(plain, list | dict):
        return [f"{indent}{name}: {_yaml_text(plain, in_one_line=True)}  # {origin}"]
    first, *rest = _yaml_text({name: plain}, in_one_line=False).split("\n")
    if rest:
        return [f"{indent}# {origin}", *(f"{indent}{line}" if line else line for line in (first, *rest))]
    return [f"{indent}{first}  # {origin}"]


def _yaml_text(value: Any, *, in_one_line: bool) -> str:
    text: str = yaml.dump(
        value,
        Dumper=ConfigDumper,
        default_flow_style=in_one_line,
        allow_unicode=True,
        sort_keys=False,
        width=100_000,
    )
    return text.rstrip("\n")


def _describe(outcome: Outcome) -> str:
    if isinstance(outcome, Unneeded):
        return f": not needed: {outcome.reason}"
    if isinstance(outcome, Unsupported):
        return f": NOT SUPPORTED: {outcome.reason}"
    settings = ", ".join(f"{name}={_shown(value)}" for name, value in outcome.values.items()) or "as it is here"
    return f" -> {settings}" + (f"; but: {outcome.difference}" if outcome.difference else "")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if "\n" not in text else f"{text.splitlines()[0]} ..."
