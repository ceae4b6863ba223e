"""halfbyte eval: held-out loss and perplexity, with the adapter and without."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from halfbyte.cli.arguments import CommandParser, at_least
from halfbyte.cli.console import json_text, progress_console
from halfbyte.cli.tuned import READING, RUN_DEFAULTS, TunedModel, find_tuned, load_tuned

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.config import DataSection
    from halfbyte.data import PreparedData
    from halfbyte.train.evaluate import HeldOut

SECTIONS = ("model", "quant", *READING, "data.packing")
EXPLANATION = f"""
{RUN_DEFAULTS}
Perplexity is exp(loss); loss is in nats a token, over the tokens that training would learn.
"""


def add_arguments(parser: CommandParser) -> None:
    parser.usage = "halfbyte eval OUT HELD_OUT [options]"
    parser.add_argument("tuned", metavar="OUT", help="folder of a run or of a PEFT adapter; or a model")
    parser.add_argument("held_out", metavar="HELD_OUT", help="file or folder of examples, or a hub data set")
    parser.add_argument("--batch-size", metavar="N", type=at_least(1), default=4, help="rows a batch; default: 4")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    parser.epilog = EXPLANATION


def run(args: argparse.Namespace) -> int:
    source = find_tuned(args.tuned, args.overrides)
    console = progress_console()
    tuned = load_tuned(source, console=console)
    prepared = read_held_out(args.held_out, source.config.data, tuned, console)
    console.print(str(prepared.report), markup=False)

    from halfbyte.nn import adapters_disabled

    figures: dict[str, HeldOut] = {}
    with adapters_disabled(tuned.model):
        figures["base" if tuned.has_adapter else "model"] = measure(
            tuned, prepared, source.config.data, args.batch_size
        )
    if tuned.has_adapter:
        figures["tuned"] = measure(tuned, prepared, source.config.data, args.batch_size)
    if args.json:
        record = {
            name: {"loss": held_out.loss, "perplexity": held_out.perplexity, "num_tokens": held_out.num_tokens}
            for name, held_out in figures.items()
        }
        print(json_text({"held_out": args.held_out, "num_examples": prepared.report.num_examples, **record}))
    else:
        for name, held_out in figures.items():
            print(f"{name + ':':<7} {held_out}")
    return 0


def read_held_out(held_out: str, options: DataSection, tuned: TunedModel, console: Console) -> PreparedData:
    """Read held-out examples the way that the run read its own, telling `console` how far it is."""
    from halfbyte.data import build_renderer
    from halfbyte.train.progress import prepare_examples, read_examples

    loaded = read_examples(held_out, options, console)
    renderer = build_renderer(
        tuned.tokenizer, chat_template=options.chat_template, system=options.system, train_on=options.train_on
    )
    return prepare_examples(loaded.examples, renderer, options, console)


def measure(tuned: TunedModel, prepared: PreparedData, options: DataSection, batch_size: int) -> HeldOut:
    """Return the held-out loss of the model as it stands."""
    from halfbyte.train.batches import BatchOptions, iter_batches, pad_id_of
    from halfbyte.train.evaluate import evaluate_loss

    batch_options = BatchOptions(
        pad_id=pad_id_of(tuned.tokenizer), row_tokens=options.max_length if options.packing else None
    )
    return evaluate_loss(tuned.model, iter_batches(prepared.examples, batch_options, batch_size=batch_size))
