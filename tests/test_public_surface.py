"""What others may build on, frozen in two text files: public names with their parameters, commands with their options.

A change here is a change for users. After one on purpose, write the files anew and say so in the change:

    python -m tests.test_public_surface
"""

from __future__ import annotations

import inspect
from pathlib import Path

import halfbyte
import halfbyte.hf
from halfbyte.cli.main import COMMANDS, load_command
from halfbyte.config.describe import list_options

GOLDEN = Path(__file__).parent / "golden"


def public_names() -> str:
    """Return a line for each name of `halfbyte`, with parameters and defaults, and for each of `halfbyte.hf`."""
    lines = [f"halfbyte.{name}{parameters(getattr(halfbyte, name))}" for name in sorted(halfbyte.__all__)]
    return "\n".join([*lines, *(f"halfbyte.hf.{name}" for name in sorted(halfbyte.hf.__all__))]) + "\n"


def parameters(thing: object) -> str:
    """Return the parameters of a function or class without annotations, which are free to become more exact."""
    assert callable(thing)
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return ""
    signature = inspect.signature(thing)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def command_line() -> str:
    """Return a line for each argument and option of each command."""
    lines = []
    for name in COMMANDS:
        _, parser = load_command(name)
        for action in parser._actions:
            words = ", ".join(action.option_strings) or str(action.metavar)
            lines.append(f"{name} {words}" + (f" {action.metavar}" if action.option_strings and action.metavar else ""))
        lines += [f"{name} --{option.full_name}" for option in list_options() if parser.takes(option)]
    return "\n".join(lines) + "\n"


def test_public_names_are_frozen() -> None:
    assert public_names() == (GOLDEN / "public_names.txt").read_text(), "see the top of this file"


def test_command_line_is_frozen() -> None:
    assert command_line() == (GOLDEN / "command_line.txt").read_text(), "see the top of this file"


if __name__ == "__main__":
    (GOLDEN / "public_names.txt").write_text(public_names())
    (GOLDEN / "command_line.txt").write_text(command_line())
