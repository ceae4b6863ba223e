"""halfbyte quantize: a model in, a 4-bit checkpoint out that transformers with bitsandbytes loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.arguments import CommandParser, add_override, at_least
from halfbyte.cli.calibration import ROWS, read_calibration
from halfbyte.cli.console import progress_console
from halfbyte.cli.tuned import READING, quant_spec
from halfbyte.config import DataSection
from halfbyte.config.load import make_section, parse_overrides
from halfbyte.config.output import refuse_used_folder
from halfbyte.errors import ConfigError

SECTIONS = (
    "quant.codebook",
    "quant.block_size",
    "quant.double_quant",
    "model.revision",
    "model.allow_16bit_experts",
    *READING,
)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("source", metavar="MODEL", help="hub id, folder or GGUF file")
    parser.add_argument("output", metavar="OUT", help="folder to write; it may not hold a model already")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16"),
        default="auto",
        help="of what stays in 16 bits, and of products; default: the model's own",
    )
    parser.add_argument(
        "--calibrate", metavar="FILE", help="examples on which to lose least; needs the whole model in memory"
    )
    parser.add_argument("--rows", metavar="N", type=at_least(1), help=f"of 512 tokens each; default: {ROWS}")
    parser.epilog = "example: halfbyte quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-nf4"


def run(args: argparse.Namespace) -> int:
    add_override(args, "model.path", args.source)
    values = parse_overrides(args.overrides)
    options, spec = make_section("model", values), quant_spec(make_section("quant", values))
    output = refuse_used_folder(Path(args.output))
    console = progress_console()

    import torch

    from halfbyte.export import export_bnb4bit, export_calibrated
    from halfbyte.models import load_tokenizer, resolve_source

    assert spec is not None, "quant.enabled is no option here"
    if args.rows is not None and args.calibrate is None:
        raise ConfigError("--rows goes with --calibrate")
    if args.calibrate is not None:
        if args.dtype != "auto":
            raise ConfigError("--dtype is not for --calibrate, which writes what stays in 16 bits as it computes")
        source = resolve_source(options.path, options.revision)
        data: DataSection = make_section("data", {"data.train": args.calibrate} | values)
        batches = read_calibration(args.calibrate, data, load_tokenizer(source), console, num_rows=args.rows or ROWS)
        with console.status("calibrating") as status:
            report = export_calibrated(
                source,
                output,
                spec,
                batches,
                allow_16bit_experts=options.allow_16bit_experts,
                on_progress=lambda done, total: status.update(f"calibrated {done} of {total} blocks"),
            )
        console.print(str(report), markup=False)
        console.print(f"wrote {output}", style="bold", markup=False)
        return 0
    report = export_bnb4bit(
        resolve_source(options.path, options.revision),
        output,
        spec,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        allow_16bit_experts=options.allow_16bit_experts,
    )
    console.print(str(report), markup=False)
    console.print(f"wrote {output}", style="bold", markup=False)
    return 0
