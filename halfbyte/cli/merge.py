"""halfbyte merge: base and adapter in, one plain transformers model out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.arguments import CommandParser, at_least
from halfbyte.cli.calibration import ROWS, read_calibration
from halfbyte.cli.console import progress_console
from halfbyte.cli.tuned import READING, RUN_DEFAULTS, TunedSource, find_tokenizer, find_tuned, quant_spec
from halfbyte.config.output import refuse_used_folder
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.models import ModelSource
    from halfbyte.quant import QuantSpec

SECTIONS = ("model.path", "model.revision", "quant", *READING)
EXPLANATION = f"""
onto dequantized  the base's 4-bit form written out in 16 bits: what the adapter was trained on, so the result answers
                  as the run did.
onto original     the base's own 16-bit weights, which the adapter has never seen: better or worse, by the task.

bits 4            a bitsandbytes 4-bit checkpoint. Rounded by itself, a merged weight falls back on the codes it had,
                  and the adapter is lost; so it is calibrated on examples. Needs the whole model in memory.

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
    parser.add_argument(
        "--bits", choices=("16", "4"), default="16", help="4: back into 4 bits, calibrated on examples; default: 16"
    )
    parser.add_argument("--calibrate", metavar="FILE", help="examples for --bits 4; default: those of the run")
    parser.add_argument("--rows", metavar="N", type=at_least(1), help=f"of 512 tokens each; default: {ROWS}")
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
    if args.bits == "4":
        return _merge_into_4bit(args, source, base, spec, output, console)
    if args.calibrate is not None or args.rows is not None:
        raise ConfigError("--calibrate and --rows go with --bits 4")
    report = merge_adapter(base, source.adapter, output, onto=args.onto, dtype=args.dtype, spec=spec)
    console.print(str(report), markup=False)
    console.print(f"wrote {output}", style="bold", markup=False)
    return 0


def _merge_into_4bit(
    args: argparse.Namespace,
    source: TunedSource,
    base: ModelSource,
    spec: QuantSpec | None,
    output: Path,
    console: Console,
) -> int:
    """Write a 4-bit checkpoint that answers as base and adapter do."""
    from halfbyte.export import export_calibrated
    from halfbyte.quant import QuantSpec

    if args.onto != "dequantized":
        raise ConfigError("--bits 4 goes with --onto dequantized: what the adapter was trained on")
    if args.dtype != "auto":
        raise ConfigError("--dtype is not for --bits 4, which writes what stays in 16 bits as it computes")
    config = source.config
    file = args.calibrate or config.data.train
    if not file:
        raise ConfigError("--bits 4 calibrates on examples, and no run tells which; name a file with --calibrate")
    tokenizer = find_tokenizer(str(source.tokenizer or source.config.model.path), source.config.model.revision)
    # Of the run's own examples only those that it learned: what it held out stays unseen.
    seed = config.train.seed if args.calibrate is None and config.data.held_out is None else None
    batches = read_calibration(file, config.data, tokenizer, console, num_rows=args.rows or ROWS, held_out_seed=seed)
    with console.status("calibrating") as status:
        report = export_calibrated(
            base,
            output,
            spec or QuantSpec(),
            batches,
            adapter=source.adapter,
            trained_on=spec,
            tokenizer_folder=source.tokenizer,
            on_progress=lambda done, total: status.update(f"calibrated {done} of {total} blocks"),
        )
    console.print(f"calibrated on {sum(map(len, batches))} rows of examples; {report}", markup=False)
    console.print(f"wrote {output}", style="bold", markup=False)
    return 0
