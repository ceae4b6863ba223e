"""halfbyte train: a model and examples in, a tuned model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.arguments import CommandParser, add_override
from halfbyte.cli.console import let_segments_grow, progress_console
from halfbyte.config.load import load_config
from halfbyte.config.resolve import resolve_output_dir
from halfbyte.distributed import join_world, num_ranks

SECTIONS = ("model", "quant", "lora", "data", "train", "memory", "output_dir")
EXAMPLES = """
examples:
  halfbyte train HuggingFaceTB/SmolLM2-135M-Instruct tickets.jsonl
  halfbyte train run.yaml --lora.rank=64 --lora.targets=q_proj,v_proj
  halfbyte train runs/my-run-1/run.yaml --resume --train.num_train_epochs=5

A run that was cut short goes on where it stopped when the same command is given again.

Any option below may stand in a YAML file, its section as the key (halfbyte schema prints a schema for editors). The
command line wins over the file.
"""


def add_arguments(parser: CommandParser) -> None:
    parser.usage = "halfbyte train MODEL DATA [options]\n       halfbyte train RUN.yaml [DATA] [options]"
    parser.add_argument(
        "source", metavar="MODEL|RUN.yaml", help="hub id, folder or GGUF file; or a YAML file of options"
    )
    parser.add_argument("data", metavar="DATA", nargs="?", help="file or folder of examples, or a hub data set")
    parser.add_argument("--output", metavar="DIR", help="output folder; default: runs/MODEL-DATA-NUMBER")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the output folder's last checkpoint, also of a finished run"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    path = Path(args.source) if args.source.lower().endswith((".yaml", ".yml")) else None
    add_override(args, "model.path", None if path else args.source)
    add_override(args, "data.train", args.data)
    add_override(args, "output_dir", args.output)
    add_override(args, "train.resume", "true" if args.resume else None)
    add_override(args, "train.overwrite", "true" if args.overwrite else None)
    config = resolve_output_dir(load_config(path, args.overrides), ranks=num_ranks())

    let_segments_grow()
    with join_world(on_cpu=config.model.device == "cpu") as world:
        from halfbyte.train import run_training

        run_training(config, console=progress_console(is_heard=world.is_main))
    return 0
