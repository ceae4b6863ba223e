"""halfbyte generate: answers to prompts from the command line, a file or a pipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.adapters import add_adapter_argument, find_voices, load_voices
from halfbyte.cli.answers import add_answer_arguments, answer, build_chat_renderer, check_comparable, generation_options
from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import json_text, progress_console
from halfbyte.cli.tuned import RUN_DEFAULTS, TunedModel, TunedSource
from halfbyte.errors import ConfigError, DataError

if TYPE_CHECKING:
    from halfbyte.models.generate import GenerationOptions

SECTIONS = ("model", "quant")
EXAMPLES = """
examples:
  halfbyte generate OUT "Where is my parcel?" --compare
  halfbyte generate OUT --file questions.txt --json > answers.jsonl
  cat questions.txt | halfbyte generate OUT
  halfbyte generate OUT --adapter other-run "Where is my parcel?"     # one answer of each
"""


def add_arguments(parser: CommandParser) -> None:
    add_answer_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="default: one a line from --file or standard input")
    parser.add_argument("--file", metavar="FILE", type=Path, help="file of prompts, one a line")
    parser.add_argument("--raw", action="store_true", help="go on from the prompt as it is, without the chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object an answer")
    parser.epilog = f"{EXAMPLES}\n{RUN_DEFAULTS}"


def run(args: argparse.Namespace) -> int:
    sources = find_voices(args)
    check_comparable(args, next(iter(sources.values())))
    options, questions = generation_options(args), read_prompts(args)
    voices = load_voices(sources, console=progress_console())
    for name in sources:
        if len(sources) > 1:
            voices.switch(name)
        tuned = voices.tuned
        prompts = encode(questions, args, voices.source, tuned)
        if len(prompts) == 1 and len(sources) == 1 and not args.compare and not args.json:
            stream(tuned, prompts[0], options)
            return 0
        base_answers: list[str] | list[None] = [None] * len(prompts)
        if args.compare:
            base_answers = answer(tuned, prompts, options=options, by_base=True)
        answers = answer(tuned, prompts, options=options)
        label = name if len(sources) > 1 else None
        for question, base_answer, words in zip(questions, base_answers, answers, strict=True):
            print(render(question, base_answer, words, as_json=args.json, adapter=label), flush=True)
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts, from wherever they were given.

    Raises:
        ConfigError: None or two sources were named.
        DataError: The file is missing, empty or no text.
    """
    if args.prompt is not None and args.file is not None:
        raise ConfigError("give a prompt or --file, not both")
    if args.prompt is not None:
        return [args.prompt]
    if args.file is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give one in quotes, name a file with --file, or pipe lines in")
    try:
        text = sys.stdin.read() if args.file is None else args.file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{args.file or 'standard input'} cannot be read: {error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"{args.file or 'standard input'} holds no prompt")
    return prompts


def encode(questions: list[str], args: argparse.Namespace, source: TunedSource, tuned: TunedModel) -> list[list[int]]:
    """Return the tokens of each prompt: as a user's turn, or as plain text to go on from."""
    from halfbyte.models.generate import encode_prompt

    if args.raw or not (tuned.tokenizer.chat_template or source.config.data.chat_template):
        return [encode_prompt(tuned.tokenizer, question) for question in questions]
    renderer = build_chat_renderer(args, source, tuned)
    return [renderer.render_chat([{"role": "user", "content": question}]) for question in questions]


def stream(tuned: TunedModel, prompt: list[int], options: GenerationOptions) -> None:
    """Print one answer as it comes."""
    answer(tuned, [prompt], options=options, on_text=lambda _, text: print(text, end="", flush=True))
    print()


def render(question: str, base_answer: str | None, words: str, *, as_json: bool, adapter: str | None = None) -> str:
    """Return what is printed of one answer; `adapter` names whose it is, where there are several."""
    if as_json:
        record = {"prompt": question, "answer": words} | ({} if adapter is None else {"adapter": adapter})
        return json_text(record if base_answer is None else {**record, "base_answer": base_answer})
    base = "" if base_answer is None else f"base:   {base_answer}\n"
    who = "tuned:  " if adapter is None else f"{adapter}: "
    return f"prompt: {question}\n{base}{who}{words}\n"
