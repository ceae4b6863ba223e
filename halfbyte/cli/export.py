"""halfbyte export: a tuned model as one GGUF file for llama.cpp and Ollama."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import progress_console
from halfbyte.cli.tuned import RUN_DEFAULTS, find_tokenizer, find_tuned, quant_spec
from halfbyte.errors import ConfigError

SECTIONS = ("model.path", "model.revision", "quant")
TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
EXPLANATION = f"""
A Modelfile for Ollama is written beside the file:

  halfbyte export my-run my-model/model.gguf --type q8_0
  ollama create my-model -f my-model/Modelfile

{RUN_DEFAULTS}
"""


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("tuned", metavar="OUT", help="folder of a run, of a PEFT adapter, or of a model")
    parser.add_argument("output", metavar="FILE.gguf", help="file to write; nothing may be there")
    parser.add_argument("--type", choices=TYPES, default="f16", help="of matrices; default: f16")
    parser.add_argument(
        "--onto", choices=("dequantized", "original"), default="dequantized", help="as in halfbyte merge"
    )
    parser.epilog = EXPLANATION


def run(args: argparse.Namespace) -> int:
    source = find_tuned(args.tuned, args.overrides)
    output, modelfile = Path(args.output), Path(args.output).parent / "Modelfile"
    if output.suffix != ".gguf":
        raise ConfigError(f"{output}: the file's name must end in .gguf")
    if modelfile.exists():
        raise ConfigError(f"{modelfile} is there already; name a file in another folder")
    console = progress_console()

    from halfbyte.export.gguf_model import export_gguf
    from halfbyte.export.ollama import make_modelfile
    from halfbyte.models import resolve_source

    model = source.config.model
    output.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"writing {output}"):
        report = export_gguf(
            resolve_source(model.path, model.revision),
            output,
            adapter=source.adapter,
            type_name=args.type.upper(),
            onto=args.onto,
            spec="run" if source.adapter is None else quant_spec(source.config.quant),
        )
    tokenizer = find_tokenizer(str(source.tokenizer or model.path), model.revision)
    text, note = make_modelfile(output.name, tokenizer, system=source.config.data.system)
    modelfile.write_text(text, encoding="utf-8")
    console.print(str(report), markup=False)
    if note is not None:
        console.print(note, style="yellow", markup=False)
    console.print(f"wrote {output} and {modelfile}", style="bold", markup=False)
    return 0
