"""halfbyte data: what the model will see of the examples, before anything is trained."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from halfbyte.cli.arguments import CommandParser, add_override, at_least
from halfbyte.cli.console import json_text, printable, progress_console, result_console
from halfbyte.cli.tuned import READING, find_tokenizer
from halfbyte.config.load import make_section, parse_overrides

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.data import TokenSpan

SECTIONS = (*READING, "model.revision")
TRAINED_STYLE, READ_STYLE = "bold green", "dim"
MARKERS = ("[[", "]]")


def add_arguments(parser: CommandParser) -> None:
    parser.usage = "halfbyte data FILE --model MODEL [options]"
    parser.add_argument("file", metavar="FILE", help="file or folder of examples, or a hub data set")
    parser.add_argument("--model", metavar="MODEL", required=True, help="model (or run) whose tokenizer reads them")
    parser.add_argument("--show", metavar="N", type=at_least(0), default=3, help="examples shown in full; default: 3")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.epilog = "example: halfbyte data tickets.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --show 5"


def run(args: argparse.Namespace) -> int:
    add_override(args, "data.train", args.file)
    values = parse_overrides(args.overrides)
    options = make_section("data", values)

    from halfbyte.data import build_renderer, token_spans
    from halfbyte.train.progress import prepare_examples, read_examples

    progress = progress_console()
    loaded = read_examples(options.train, options, progress)
    tokenizer = find_tokenizer(args.model, values.get("model.revision"))
    renderer = build_renderer(
        tokenizer, chat_template=options.chat_template, system=options.system, train_on=options.train_on
    )
    prepared = prepare_examples(loaded.examples, renderer, options, progress)
    shown = {example.origin: token_spans(tokenizer, example) for example in prepared.examples[: args.show]}
    if args.json:
        record = {
            "read": dataclasses.asdict(loaded.report),
            "prepared": dataclasses.asdict(prepared.report),
            "shown": {origin: [span._asdict() for span in spans] for origin, spans in shown.items()},
        }
        print(json_text(record))
        return 0
    console = result_console()
    for origin, spans in shown.items():
        show_example(console, origin, spans)
    console.print(f"{loaded.report}\n{prepared.report}", markup=False)
    return 0


def show_example(console: Console, origin: str, spans: list[TokenSpan]) -> None:
    """Print an example, its learned tokens in colour, or between markers where there is no colour."""
    from rich.text import Text

    in_colour = console.color_system is not None and not console.no_color
    opening, closing = ("", "") if in_colour else MARKERS
    text = Text()
    for span in spans:
        words = printable(span.text)
        if span.is_trained:
            text.append(f"{opening}{words}{closing}", style=TRAINED_STYLE)
        else:
            text.append(words, style=READ_STYLE)
    legend = "green is learned" if in_colour else f"{opening}...{closing} is learned"
    console.print(f"--- {origin} ({legend})", style="bold", markup=False)
    console.print(text)
    console.print()
