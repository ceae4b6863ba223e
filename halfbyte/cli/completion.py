"""halfbyte completion: a script by which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.shells import SHELLS, list_words

SECTIONS = ()
EXPLANATION = """
Into the shell's startup file:

  bash   eval "$(halfbyte completion bash)"        in ~/.bashrc
  zsh    eval "$(halfbyte completion zsh)"         in ~/.zshrc, after compinit
  fish   halfbyte completion fish | source         in ~/.config/fish/config.fish

The script knows this release's options by heart: completing starts no Python. Write it anew after an update.
"""


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("shell", choices=tuple(SHELLS), metavar="SHELL", help=", ".join(SHELLS))
    parser.epilog = EXPLANATION


def run(args: argparse.Namespace) -> int:
    print(SHELLS[args.shell](list_words()), end="")
    return 0
