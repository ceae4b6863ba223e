"""Reading options: from a YAML file, from a command line, and the config they make together.

Order: defaults < YAML < command line. In between, options are a flat mapping from full name to value
(`{"lora.rank": 64}`), so that merging is an update. YAML is read as a tree of text, and each text by the type of its
option (see `values`): the tree also knows lines, which messages name.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from halfbyte.config.describe import REQUIRED, Option, find_option, list_options, nearest_option, sections
from halfbyte.config.output import RUN_FILE, save_text
from halfbyte.config.run import RunConfig
from halfbyte.config.values import NONE_WORDS, NotOfTypeError, check_bounds, check_value, parse_text
from halfbyte.errors import ConfigError

MAX_NODES = 100_000


def load_config(path: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Return the run that a YAML file and command-line options describe.

    Args:
        path: The YAML file, if any.
        overrides: Text by full name or alias, as in {"lora.rank": "64"}; these win over the file.

    Raises:
        ConfigError: naming file, line and option, or the option on the command line.
    """
    values = read_yaml(Path(path)) if path is not None else {}
    values.update(parse_overrides(overrides or {}))
    return make_config(values)


def make_config(values: Mapping[str, Any]) -> RunConfig:
    """Return the run that values by full name describe, the rest at their defaults."""
    made = {name: make_section(name, values) for name in sections()}
    return RunConfig(output_dir=values.get("output_dir"), **made)


def make_section(name: str, values: Mapping[str, Any]) -> Any:
    """Return one section made of those values that belong to it."""
    known = [option for option in list_options() if option.section == name]
    for option in known:
        if option.default is REQUIRED and option.full_name not in values:
            raise ConfigError(f"{option.full_name} is not set: {option.doc}")
    given = {option.name: values[option.full_name] for option in known if option.full_name in values}
    return sections()[name](**given)


def parse_overrides(overrides: Mapping[str, str]) -> dict[str, Any]:
    """Return command-line text as values by full name."""
    values: dict[str, Any] = {}
    for name, text in overrides.items():
        option = _known_option(name, where="")
        if option.full_name in values:
            raise ConfigError(f"{option.full_name} is given twice, once by another name")
        values[option.full_name] = _checked(option, functools.partial(parse_text, text), text, where="")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file by full name.

    Raises:
        ConfigError: The file is missing, no YAML, or holds an unknown option or a value that is not allowed.
    """
    root = compose_yaml(path, expected="sections such as 'model:' and 'data:'")
    values: dict[str, Any] = {}
    for name, node, where in entries_of(root, path):
        if name not in sections():
            _add(values, name, node, where)
        elif isinstance(node, yaml.MappingNode):
            for inner, inner_node, inner_where in entries_of(node, path):
                _add(values, f"{name}.{inner}", inner_node, inner_where)
        elif not _is_null(node):
            raise ConfigError(f"{where}{name} is a section; put its options below it, indented")
    return values


def compose_yaml(path: Path, *, expected: str) -> yaml.MappingNode:
    """Return the tree of a YAML file.

    Raises:
        ConfigError: The file is missing, no YAML, or no mapping; `expected` says of what.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep to be read") from None
    # Of a value that PyYAML takes for text and Python cannot: a byte that no character begins with, for one.
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if root is not None:
        _check_size(root, path)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: no options in it; expected {expected}")
    return root


def to_yaml(config: RunConfig) -> str:
    """Return YAML from which `load_config` makes an equal config."""
    return yaml.dump(_plain(config), Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=120)


def save_run_config(config: RunConfig, folder: str | Path) -> Path:
    """Write the options of a run to run.yaml in its folder; not resume and overwrite, which only say how it began."""
    path = Path(folder) / RUN_FILE
    save_text(to_yaml(lasting_config(config)), path)
    return path


def lasting_config(config: RunConfig) -> RunConfig:
    """Return a config without what only says how a run began."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, resume="auto", overwrite=False))


RARE_LINE_ENDS = "\x85\u2028\u2029"


class ConfigDumper(yaml.SafeDumper):
    """Quotes the words that mean nothing (none, null, ~) where they are text, and rare line ends, which get folded."""

    def represent_text(self, text: str) -> yaml.Node:
        quoted = text.strip().lower() in NONE_WORDS or any(end in text for end in RARE_LINE_ENDS)
        style = '"' if quoted else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


ConfigDumper.add_representer(str, ConfigDumper.represent_text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _check_size(root: yaml.Node, path: Path) -> None:
    """Refuse a tree that is larger than a person writes: aliases of aliases stand for billions of values."""
    waiting, num_nodes = [root], 0
    while waiting:
        node = waiting.pop()
        num_nodes += 1
        if num_nodes > MAX_NODES:
            raise ConfigError(f"{path}: its aliases (*name) stand for more than {MAX_NODES} values; write them out")
        if isinstance(node, yaml.MappingNode):
            waiting += [inner for pair in node.value for inner in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def entries_of(node: yaml.MappingNode, path: Path) -> list[tuple[str, yaml.Node, str]]:
    """Return key, value node and `file:line: ` of each entry of a mapping."""
    entries: list[tuple[str, yaml.Node, str]] = []
    known: set[str] = set()
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}: "
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}an option's name must be one word")
        if key.value in known:
            raise ConfigError(f"{where}{key.value} is given twice")
        known.add(key.value)
        entries.append((key.value, value, where))
    return entries


def _add(values: dict[str, Any], name: str, node: yaml.Node, where: str) -> None:
    option = _known_option(name, where=where)
    if option.full_name in values:
        raise ConfigError(f"{where}{option.full_name} is given twice, once by another name")
    values[option.full_name] = _checked(option, functools.partial(_read_node, node), _shown(node), where=where)


def _known_option(name: str, *, where: str) -> Option:
    option = find_option(name)
    if option is None:
        nearest = nearest_option(name)
        hint = f"; did you mean {nearest}?" if nearest else "; halfbyte train --help lists them all"
        raise ConfigError(f"{where}unknown option {name}{hint}")
    return option


def _checked(option: Option, read: Callable[[Any], Any], shown: str, *, where: str) -> Any:
    try:
        value = read(option.hint)
    except NotOfTypeError:
        value = None
    else:
        if check_bounds(value, option.bounds):
            return value
    raise ConfigError(f"{where}{option.full_name} is {shown!r}; allowed: {option.allowed}")


def _read_node(node: yaml.Node, hint: Any) -> Any:
    """Read a YAML node as a value of type `hint`."""
    if isinstance(node, yaml.ScalarNode):
        return parse_text(node.value, hint, quoted=node.style is not None)
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for member in members:
        origin, args = typing.get_origin(member), typing.get_args(member)
        if isinstance(node, yaml.SequenceNode) and origin is tuple:
            return check_value([_read_node(item, args[0]) for item in node.value], member)
        if isinstance(node, yaml.MappingNode) and origin is dict:
            return {str(key.value): _read_node(item, args[1]) for key, item in node.value}
    raise NotOfTypeError


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in NONE_WORDS


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    return yaml.serialize(node, Dumper=yaml.SafeDumper).strip()
