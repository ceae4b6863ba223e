"""Completion scripts for shells, written from the commands' own parsers.

A script holds all words: commands, options of each, values of options that have a fixed few. Options of a run stand
with their equals sign, as the help writes them. Where a value is free, and for arguments, file names are completed.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from halfbyte.cli.arguments import CommandParser
from halfbyte.config.describe import list_options


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptionWords:
    """One option as a shell sees it."""

    name: str
    """With its dashes; of an option of a run with its equals sign."""
    summary: str
    takes_value: bool
    values: tuple[str, ...] = ()
    """All that it may be; empty where that is not a fixed few."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CommandWords:
    """One command as a shell sees it."""

    name: str
    summary: str
    options: tuple[OptionWords, ...]
    argument_values: tuple[str, ...]
    """What its first argument may be; empty where that is not a fixed few."""


def list_words() -> list[CommandWords]:
    """Return the words of all commands."""
    from halfbyte.cli.main import COMMANDS, load_command

    return [_words_of(name, summary, load_command(name)[1]) for name, summary in COMMANDS.items()]


def bash_script(commands: Sequence[CommandWords]) -> str:
    """Return the script for bash."""
    options, values = [], []
    for command in commands:
        names = " ".join(option.name for option in command.options)
        arguments = " ".join(command.argument_values)
        options.append(f'        {command.name}) options="{names}" arguments="{arguments}" ;;\n')
        for option in command.options:
            if option.takes_value:
                name = option.name.removesuffix("=")
                values.append(f'        "{command.name} {name}") has_value=1 values="{" ".join(option.values)}" ;;\n')
    return _BASH.format(
        commands=" ".join([*(command.name for command in commands), "--help", "--version"]),
        options="".join(options),
        values="".join(values),
    )


def zsh_script(commands: Sequence[CommandWords]) -> str:
    """Return the script for zsh."""
    listed = "".join(f"        {_quoted(f'{one.name}:{one.summary}')}\n" for one in commands)
    cases = []
    for command in commands:
        specs = [_zsh_option(option) for option in command.options]
        specs.append(
            f"'*:word:({' '.join(command.argument_values)})'" if command.argument_values else "'*:file:_files'"
        )
        cases.append(f"        {command.name}) _arguments {' '.join(specs)} ;;\n")
    return _ZSH.format(commands=listed, cases="".join(cases))


def fish_script(commands: Sequence[CommandWords]) -> str:
    """Return the script for fish."""
    lines = ["# Completion of halfbyte in fish.", "complete -c halfbyte -e"]
    names = " ".join(command.name for command in commands)
    first = f"'not __fish_seen_subcommand_from {names}'"
    for command in commands:
        lines.append(f"complete -c halfbyte -f -n {first} -a {command.name} -d {_quoted(command.summary)}")
    for command in commands:
        start = f"complete -c halfbyte -n '__fish_seen_subcommand_from {command.name}'"
        if command.argument_values:
            lines.append(f"{start} -f -a '{' '.join(command.argument_values)}'")
        for option in command.options:
            line = f"{start} {_fish_name(option)} -d {_quoted(option.summary)}"
            if option.takes_value:
                line += f" -x -a '{' '.join(option.values)}'" if option.values else " -r"
            lines.append(line)
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Sequence[CommandWords]], str]] = {
    "bash": bash_script,
    "zsh": zsh_script,
    "fish": fish_script,
}

# COMP_WORDBREAKS has the equals sign: --a.b=c comes as three words.
_BASH = """\
# Completion of halfbyte in bash.
_halfbyte() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
    local options= arguments= values= has_value=
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    if [[ $word == "=" ]]; then
        word=
    elif [[ $before == "=" && $COMP_CWORD -gt 2 ]]; then
        before=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    case ${{COMP_WORDS[1]}} in
{options}    esac
    case "${{COMP_WORDS[1]}} $before" in
{values}    esac
    if [[ -n $has_value ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    elif [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
        [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2> /dev/null
    else
        COMPREPLY=($(compgen -W "$arguments" -- "$word"))
    fi
}}
complete -o default -F _halfbyte halfbyte
"""
_ZSH = """\
#compdef halfbyte
# Completion of halfbyte in zsh.
_halfbyte() {{
    local -a commands=(
{commands}    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{cases}    esac
}}
compdef _halfbyte halfbyte
"""


def _words_of(name: str, summary: str, parser: CommandParser) -> CommandWords:
    arguments = [action for action in parser._actions if not action.option_strings]
    choices = tuple(map(str, arguments[0].choices or ())) if arguments else ()
    options = [option for action in parser._actions for option in _words_of_action(action)]
    for option in list_options():
        if parser.takes(option):
            options.append(
                OptionWords(
                    name=f"--{option.full_name}=",
                    summary=_first_sentence(option.doc),
                    takes_value=True,
                    values=tuple(dict.fromkeys(_fixed_values(option.hint))),
                )
            )
    return CommandWords(name=name, summary=summary, options=tuple(options), argument_values=choices)


def _words_of_action(action: argparse.Action) -> Iterator[OptionWords]:
    for name in action.option_strings:
        yield OptionWords(
            name=name,
            summary=_first_sentence(action.help or ""),
            takes_value=action.nargs != 0,
            values=tuple(map(str, action.choices or ())),
        )


def _fixed_values(hint: Any) -> Iterator[str]:
    """Yield the words that an option of this type may be, if they are a fixed few."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        yield from ("true", "false")
    elif origin is Literal:
        yield from map(str, args)
    elif origin in (typing.Union, types.UnionType):
        yield from (word for member in args for word in _fixed_values(member))


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_option(option: OptionWords) -> str:
    summary = option.summary.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    value = ""
    if option.takes_value:
        value = f":value:({' '.join(option.values)})" if option.values else ":value:_files"
    name = option.name if option.name.endswith("=") or not option.takes_value else f"{option.name}="
    return _quoted(f"{name}[{summary}]{value}")


def _fish_name(option: OptionWords) -> str:
    word = option.name.removesuffix("=")
    return f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
