"""halfbyte chat: talk to a tuned model, turn by turn."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from halfbyte.cli.adapters import Voices, add_adapter_argument, find_voices, load_voices
from halfbyte.cli.answers import add_answer_arguments, answer, build_chat_renderer, check_comparable, generation_options
from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import progress_console, result_console
from halfbyte.cli.tuned import RUN_DEFAULTS, TunedModel
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.models.generate import GenerationOptions

SECTIONS = ("model", "quant")
HINT = "/reset forgets the conversation, /quit (or Ctrl-D) ends it"
SWITCH_HINT = "/adapter NAME lets another adapter answer"


def add_arguments(parser: CommandParser) -> None:
    add_answer_arguments(parser)
    add_adapter_argument(parser)
    parser.epilog = f"in the conversation: {HINT}; {SWITCH_HINT}.\n\n{RUN_DEFAULTS}"


def run(args: argparse.Namespace) -> int:
    sources = find_voices(args)
    check_comparable(args, next(iter(sources.values())))
    options = generation_options(args)
    voices = load_voices(sources, console=progress_console())
    renderer = build_chat_renderer(args, voices.source, voices.tuned)
    hint = f"{HINT}; {SWITCH_HINT} ({', '.join(sources)})" if len(sources) > 1 else HINT
    result_console().print(hint, style="dim", markup=False)

    from halfbyte.models.generate import inference_state

    turns: list[dict[str, Any]] = []
    # Entered once for the whole conversation: what answering prepares is not prepared again at each turn.
    with inference_state(voices.tuned.model):
        while (words := ask()) not in (None, "/quit", "/exit"):
            if words == "/reset":
                turns = []
            elif words == "/adapter" or words.startswith("/adapter "):
                switch(voices, words.removeprefix("/adapter").strip())
                renderer = build_chat_renderer(args, voices.source, voices.tuned)
            elif words:
                asked = [*turns, {"role": "user", "content": words}]
                reply = talk(voices.tuned, renderer.render_chat(asked), options, compare=args.compare)
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


def switch(voices: Voices, name: str) -> None:
    """Let another adapter answer from the next turn on, or say which there are."""
    try:
        if name:
            voices.switch(name)
    except ConfigError as error:
        print(error)
        return
    print(f"{voices.current} answers; there are {', '.join(voices.models)}")


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
