"""halfbyte merge: base and adapter in, one plain transformers model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import progress_console
from halfbyte.cli.tuned import RUN_DEFAULTS, find_tuned, quant_spec
from halfbyte.config.output import refuse_used_folder
from halfbyte.errors import ConfigError

SECTIONS = ("model.path", "model.revision", "quant")
EXPLANATION = f"""
onto dequantized  the base's 4-bit form written out in 16 bits: what the adapter was trained on, so the result answers
                  as the run did.
onto original     the base's own 16-bit weights, which the adapter has never seen: better or worse, by the task.

halfbyte eval MERGED HELD_OUT measures which is better for yours.

{RUN_DEFAULTS}
"""


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("tuned", metavar="OUT", help="folder of a run or of a PEFT adapter")
    parser.add_argument("output", metavar="MERGED", help="folder to write; it may not hold a model already")
    parser.add_argument(
        "--onto", choices=("dequantized", "original"), default="dequantized", help="default: dequantized"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the weights written"
    )
    parser.epilog = EXPLANATION


def run(args: argparse.Namespace) -> int:
    source = find_tuned(args.tuned, args.overrides)
    if source.adapter is None:
        raise ConfigError(f"{args.tuned} is a model without an adapter; there is nothing to merge")
    output = refuse_used_folder(Path(args.output))
    console = progress_console()

    from halfbyte.export import merge_adapter
    from halfbyte.models import resolve_source

    base = resolve_source(source.config.model.path, source.config.model.revision)
    spec = quant_spec(source.config.quant)
    report = merge_adapter(base, source.adapter, output, onto=args.onto, dtype=args.dtype, spec=spec)
    console.print(str(report), markup=False)
    console.print(f"wrote {output}", style="bold", markup=False)
    return 0
