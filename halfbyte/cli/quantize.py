"""halfbyte quantize: a model in, a 4-bit checkpoint out that transformers with bitsandbytes loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.arguments import CommandParser, add_override
from halfbyte.cli.console import progress_console
from halfbyte.cli.tuned import quant_spec
from halfbyte.config.load import make_section, parse_overrides
from halfbyte.config.output import refuse_used_folder
from halfbyte.errors import ConfigError

SECTIONS = ("quant", "model.revision", "model.dtype", "model.device", "model.allow_16bit_experts")


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("source", metavar="MODEL", help="hub id, folder or GGUF file")
    parser.add_argument("output", metavar="OUT", help="folder to write; it may not hold a model already")
    parser.epilog = "example: halfbyte quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-nf4"


def run(args: argparse.Namespace) -> int:
    add_override(args, "model.path", args.source)
    values = parse_overrides(args.overrides)
    model, spec = make_section("model", values), quant_spec(make_section("quant", values))
    if spec is None:
        raise ConfigError("quant.enabled is false, and quantising is all that this command does")
    output = refuse_used_folder(Path(args.output))
    console = progress_console()

    from halfbyte.export import export_bnb4bit

    report = export_bnb4bit(model.path, output, spec)
    console.print(str(report), markup=False)
    console.print(f"wrote {output}", style="bold", markup=False)
    return 0
