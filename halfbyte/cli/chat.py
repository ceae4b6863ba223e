"""halfbyte chat: talk to a tuned model, turn by turn."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from halfbyte.cli.answers import add_answer_arguments, answer, build_chat_renderer, check_comparable, generation_options
from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import progress_console, result_console
from halfbyte.cli.tuned import RUN_DEFAULTS, TunedModel, find_tuned, load_tuned
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.models.generate import GenerationOptions

SECTIONS = ("model", "quant")
HINT = "/reset forgets the conversation, /quit (or Ctrl-D) ends it"


def add_arguments(parser: CommandParser) -> None:
    add_answer_arguments(parser)
    parser.epilog = f"in the conversation: {HINT}.\n\n{RUN_DEFAULTS}"


def run(args: argparse.Namespace) -> int:
    source = find_tuned(args.tuned, args.overrides)
    check_comparable(args, source)
    options = generation_options(args)
    tuned = load_tuned(source, console=progress_console())
    renderer = build_chat_renderer(args, source, tuned)
    result_console().print(HINT, style="dim", markup=False)

    from halfbyte.models.generate import inference_state

    turns: list[dict[str, Any]] = []
    # Entered once for the whole conversation: what answering prepares is not prepared again at each turn.
    with inference_state(tuned.model):
        while (words := ask()) not in (None, "/quit", "/exit"):
            if words == "/reset":
                turns = []
            elif words:
                asked = [*turns, {"role": "user", "content": words}]
                reply = talk(tuned, renderer.render_chat(asked), options, compare=args.compare)
                turns = turns if reply is None else [*asked, {"role": "assistant", "content": reply}]
    return 0


def ask() -> str | None:
    """Return what the person types next, or None when they have left."""
    if sys.stdin.isatty():
        # With it, input() has line editing and a history.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    try:
        return input("\nyou: ").strip()
    except EOFError:
        print()
        return None


def talk(tuned: TunedModel, prompt: list[int], options: GenerationOptions, *, compare: bool) -> str | None:
    """Print the answer as it comes and return it; None where the conversation has outgrown the model."""

    def show(_: int, text: str) -> None:
        print(text, end="", flush=True)

    try:
        if compare:
            print("base: ", end="", flush=True)
            answer(tuned, [prompt], options=options, on_text=show, by_base=True)
            print("\n")
        print("tuned: " if compare else "model: ", end="", flush=True)
        words = answer(tuned, [prompt], options=options, on_text=show)[0]
    except ConfigError as error:
        print(f"\n{error}; /reset forgets the conversation")
        return None
    print()
    return words
