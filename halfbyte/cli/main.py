"""The entry point: find the command, run it, and turn what goes wrong into one line.

Exit codes are part of what scripts build on; EXIT_CODES says them, and so does the help.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from halfbyte.cli.arguments import CommandParser, make_parser, nearest_word, parse_words
from halfbyte.cli.console import quiet_libraries
from halfbyte.errors import ConfigError, HalfbyteError

COMMANDS = {
    "train": "fine-tune a model on examples",
    "plan": "say what fits a GPU before a run, how fast, and what to change",
    "data": "show what the model will see of the examples",
    "chat": "talk to a tuned model",
    "generate": "answer prompts with a tuned model",
    "eval": "measure a tuned model on held-out examples, with and without its adapter",
    "merge": "put the adapter into the base: one plain model",
    "export": "write a tuned model as a GGUF file, for llama.cpp and Ollama",
    "quantize": "write a model as a 4-bit checkpoint",
    "runs": "list what has been trained, with held-out loss before and after",
    "doctor": "say what works on this machine and what is missing, and train one step to prove it",
    "import-config": "translate a configuration of Axolotl or LLaMA-Factory into run.yaml",
    "schema": "print the JSON schema of run.yaml, for editors",
    "completion": "print a script by which bash, zsh or fish completes commands and options",
}

EXIT_CODES = {
    0: "done",
    1: "a fault of halfbyte's, with its traceback; or doctor's training step does not work",
    2: "something to mend: a mistake, a damaged file, a run that does not fit, what is not supported",
    130: "interrupted; a training has saved a checkpoint, and the same command goes on with it",
    143: "terminated; a training likewise",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: The command line without the program's name; default: that of the process.

    Returns:
        The exit code.
    """
    quiet_libraries()
    # Of several ranks, the first speaks for all but about what went wrong.
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    try:
        return run_command(list(sys.argv[1:] if words is None else words))
    except HalfbyteError as error:
        print(f"halfbyte: {rank}{error.label}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # A terminal has just echoed ^C in the middle of a line.
        print("\nhalfbyte: interrupted" if sys.stderr.isatty() else "halfbyte: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); the interpreter would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run_command(words: list[str]) -> int:
    """Choose the command by the first word and import its module only."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from halfbyte import __version__

        print(f"halfbyte {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        nearest = nearest_word(name, COMMANDS)
        hint = f"did you mean {nearest}?" if nearest else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name}; {hint}")
    command, parser = load_command(name)
    if {"-h", "--help"} & set(words[1:]):
        print(parser.format_help())
        return 0
    return command.run(parse_words(parser, words[1:]))


def load_command(name: str) -> tuple[ModuleType, CommandParser]:
    """Return the module of a command and its parser."""
    command = importlib.import_module(f"halfbyte.cli.{name.replace('-', '_')}")
    parser = make_parser(name, COMMANDS[name], command.SECTIONS)
    command.add_arguments(parser)
    return command, parser


def overview() -> str:
    """Return the help of the program: its commands and exit codes, a line each."""
    lines = [f"  {name:<13} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: halfbyte COMMAND ...",
            "",
            "Fine-tune large language models with QLoRA.",
            "",
            *lines,
            "",
            "exit codes:",
            *(f"  {code:<13} {meaning}" for code, meaning in EXIT_CODES.items()),
            "",
            "halfbyte COMMAND --help lists the options of a command, halfbyte --version the version.",
        ]
    )
