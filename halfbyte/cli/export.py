"""halfbyte export: a tuned model, or its adapter alone, as one GGUF file for llama.cpp and Ollama."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import progress_console
from halfbyte.cli.tuned import RUN_DEFAULTS, TunedSource, find_tokenizer, find_tuned, quant_spec
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.models import ModelSource

SECTIONS = ("model.path", "model.revision", "quant", "data.system")
TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
EXPLANATION = f"""
A Modelfile for Ollama is written beside the file:

  halfbyte export my-run my-model/model.gguf --type q8_0
  ollama create my-model -f my-model/Modelfile

With --adapter-only the file holds the adapter, to be added to its base: llama-server -m base.gguf --lora adapter.gguf.

{RUN_DEFAULTS}
"""


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("tuned", metavar="OUT", help="folder of a run, of a PEFT adapter, or of a model")
    parser.add_argument("output", metavar="FILE.gguf", help="file to write; nothing may be there")
    parser.add_argument("--type", choices=TYPES, help="of matrices; default: f16, of an adapter alone f32")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapter alone, in f32, f16 or bf16")
    parser.add_argument("--onto", choices=("dequantized", "original"), help="as in halfbyte merge")
    parser.add_argument(
        "--pre-tokenizer", metavar="NAME", help="llama.cpp's name for how words are split, where it is not recognised"
    )
    parser.epilog = EXPLANATION


def run(args: argparse.Namespace) -> int:
    source = find_tuned(args.tuned, args.overrides)
    output, modelfile = Path(args.output), Path(args.output).parent / "Modelfile"
    if output.suffix != ".gguf":
        raise ConfigError(f"{output}: the file's name must end in .gguf")
    for path in (output, modelfile):
        if path.exists():
            raise ConfigError(f"{path} is there already; name a file in another folder")
    if args.adapter_only and source.adapter is None:
        raise ConfigError(f"{args.tuned} is a model without an adapter; leave --adapter-only out")
    if args.adapter_only and (args.onto or args.pre_tokenizer):
        raise ConfigError("--onto and --pre-tokenizer are for whole models; leave them out with --adapter-only")
    console = progress_console()

    from halfbyte.export.ollama import make_modelfile
    from halfbyte.models import resolve_source

    model = source.config.model
    base = resolve_source(model.path, model.revision)
    made = make_modelfile(
        output.parent,
        find_tokenizer(str(source.tokenizer or model.path), model.revision),
        weights=_weights_of(base) if args.adapter_only else output,
        adapter=output if args.adapter_only else None,
        system=source.config.data.system,
    )
    with console.status(f"writing {output}"):
        report = _write(args, source, base, output)
    made.save(modelfile)
    console.print(report, markup=False)
    for note in made.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"wrote {output} and {modelfile}", style="bold", markup=False)
    return 0


def _weights_of(base: ModelSource) -> Path:
    """Return what Ollama takes for the base that an adapter is added to."""
    return base.weight_files[0] if base.kind == "gguf" else base.folder


def _write(args: argparse.Namespace, source: TunedSource, base: ModelSource, output: Path) -> str:
    """Write the GGUF file and return what there is to say about it."""
    from halfbyte.export import export_gguf, export_gguf_adapter

    if args.adapter_only:
        assert source.adapter is not None
        return str(export_gguf_adapter(base, output, adapter=source.adapter, type_name=(args.type or "f32").upper()))
    return str(
        export_gguf(
            base,
            output,
            adapter=source.adapter,
            type_name=(args.type or "f16").upper(),
            onto=args.onto or "dequantized",
            spec="run" if source.adapter is None else quant_spec(source.config.quant),
            pre_tokenizer=args.pre_tokenizer,
        )
    )
