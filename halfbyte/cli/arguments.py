"""Words of a command line: the few arguments of a command, and the options of a run as --section.option=value.

argparse reads the former. The latter are taken out first and kept as text by full name; their types, defaults and
docs are the config's own (`halfbyte.config.describe`), from which the help is written too.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn

from halfbyte.config.describe import Option, find_option, list_options, nearest_option, sections
from halfbyte.config.values import FALSE_WORDS, TRUE_WORDS
from halfbyte.errors import ConfigError

HELP_COLUMN = 34
LONGEST_PLACEHOLDER = 40


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: it raises instead of exiting, and its help ends with the options of its sections."""

    sections: tuple[str, ...] = ()
    """Sections of the config that the command takes options of; an entry with a dot is one option."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        options = [option for option in list_options() if self.takes(option)]
        return super().format_help() + "".join(_render_group(name, options) for name in (*sections(), ""))

    def takes(self, option: Option) -> bool:
        return option.section in self.sections or option.full_name in self.sections


def make_parser(name: str, summary: str, section_names: tuple[str, ...]) -> CommandParser:
    """Return an empty parser for a command."""
    parser = CommandParser(
        prog=f"halfbyte {name}",
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.sections = section_names
    return parser


def parse_words(parser: CommandParser, words: list[str]) -> argparse.Namespace:
    """Return the arguments of a command; its `overrides` hold the section options, text by full name.

    Raises:
        ConfigError: An unknown option (with the nearest name), a missing value, or an argument too many.
    """
    rest, overrides = _take_section_options(parser, words)
    # Intermixed parsing accepts `train MODEL --output DIR DATA`, but takes words after `--` for options.
    parse = parser.parse_known_args if "--" in rest else parser.parse_known_intermixed_args
    args, unknown = parse(rest)
    if unknown:
        raise ConfigError(_say_unknown(parser, unknown[0]))
    args.overrides = overrides
    return args


def at_least(minimum: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number from `minimum` on."""

    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {minimum}")
        return int(text)

    return whole_number


def add_override(args: argparse.Namespace, name: str, value: str | None) -> None:
    """Enter a command's own word for a config option (`--output` for output_dir), where it was given."""
    if value is None:
        return
    if name in args.overrides:
        raise ConfigError(f"{name} is given twice, as an argument and as --{name}")
    args.overrides[name] = value


def nearest_word(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like `word`, or None if none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def _take_section_options(parser: CommandParser, words: list[str]) -> tuple[list[str], dict[str, str]]:
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if word == "--":
            return [*rest, word, *queue], overrides
        if not word.startswith("--") or not ("." in name or name == "output_dir"):
            rest.append(word)
            continue
        option = find_option(name)
        if option is None:
            raise ConfigError(_say_unknown(parser, word))
        if not parser.takes(option):
            raise ConfigError(f"{parser.prog} takes no --{name}; see {parser.prog} --help")
        if option.full_name in overrides:
            raise ConfigError(f"--{option.full_name} is given twice")
        overrides[option.full_name] = text if equals else _following_value(option, queue)
    return rest, overrides


def _following_value(option: Option, queue: list[str]) -> str:
    """Return the value of an option written without `=`: the next word, or true for a switch."""
    if _is_switch(option) and not (queue and queue[0].lower() in TRUE_WORDS + FALSE_WORDS):
        return "true"
    if not queue or queue[0].startswith("--"):
        raise ConfigError(f"--{option.full_name} needs a value: {option.allowed}")
    return queue.pop(0)


def _say_unknown(parser: CommandParser, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}; see {parser.prog} --help"
    name = word.lstrip("-").partition("=")[0]
    own = {text.lstrip("-"): text for action in parser._actions for text in action.option_strings}
    near = nearest_word(name, own)
    if near is None:
        full_name = nearest_option(name)
        option = find_option(full_name) if full_name else None
        near_text = f"--{full_name}" if option and parser.takes(option) else None
    else:
        near_text = own[near]
    hint = f"did you mean {near_text}?" if near_text else f"see {parser.prog} --help"
    return f"unknown option --{name}; {hint}"


def _is_switch(option: Option) -> bool:
    return option.hint is bool or bool in typing.get_args(option.hint)


def _render_group(section: str, options: list[Option]) -> str:
    members = [option for option in options if option.section == section]
    if not members:
        return ""
    title = sections()[section].__doc__ if section else "The run"
    return f"\n{title}:\n" + "".join(_render_option(option) for option in members)


def _render_option(option: Option) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    placeholder, choices = _placeholder(option.hint), ""
    if len(placeholder) > LONGEST_PLACEHOLDER:
        placeholder, choices = "NAME", f" One of {placeholder.replace('|', ', ')}."
    also = f" (also: {', '.join(option.aliases)})" if option.aliases else ""
    head = f"  --{option.full_name}={placeholder}"
    body = textwrap.wrap(f"{option.doc}{choices}{also} [{option.default_text}]", width - HELP_COLUMN)
    if len(head) < HELP_COLUMN:
        head, body = head.ljust(HELP_COLUMN) + body[0], body[1:]
    return "\n".join([head, *(" " * HELP_COLUMN + line for line in body)]) + "\n"


def _placeholder(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(_placeholder(member) for member in args if member is not types.NoneType))
    if origin is tuple:
        return f"{_placeholder(args[0])},..."
    if origin is dict:
        return f"NAME={_placeholder(args[1])},..."
    return {bool: "true|false", int: "N", float: "X"}.get(hint, "TEXT")
