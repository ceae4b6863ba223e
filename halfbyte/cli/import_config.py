"""halfbyte import-config: another trainer's YAML file in, a run.yaml out, and what became of every key."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfbyte.cli.arguments import CommandParser
from halfbyte.config.foreign import KINDS, translate_file
from halfbyte.errors import ConfigError

SECTIONS = ()
EXPLANATION = """
examples:
  halfbyte import-config axolotl.yaml > run.yaml
  halfbyte import-config qlora.yml --output run.yaml --allow-unsupported

Every key is translated, not needed here, or not supported, and a line on stderr says which. Keys that are left out of
the file are translated with the defaults that they have there. Exit code 2, and no run.yaml, if a key is not supported.
"""


def add_arguments(parser: CommandParser) -> None:
    parser.usage = "halfbyte import-config FILE.yaml [options]"
    parser.add_argument(
        "file", metavar="FILE.yaml", help=f"a file of {' or '.join(one.name for one in KINDS.values())}"
    )
    parser.add_argument("--from", dest="kind", choices=tuple(KINDS), help="whose file it is; default: told by its keys")
    parser.add_argument("--output", metavar="RUN.yaml", help="file to write; default: standard output")
    parser.add_argument("--allow-unsupported", action="store_true", help="leave out what is not supported")
    parser.epilog = EXPLANATION


def run(args: argparse.Namespace) -> int:
    output = Path(args.output) if args.output else None
    if output is not None and output.exists():
        raise ConfigError(f"{output} exists; name another file, or remove it first")
    translation = translate_file(Path(args.file), args.kind)
    for line in translation.report():
        print(line, file=sys.stderr)
    if translation.unsupported and not args.allow_unsupported:
        keys = ", ".join(one.key for one in translation.unsupported)
        raise ConfigError(f"not supported: {keys}; --allow-unsupported leaves them out")
    translation.make_config()
    if output is None:
        print(translation.to_yaml(), end="")
    else:
        output.write_text(translation.to_yaml(), encoding="utf-8")
        print(f"wrote {output}", file=sys.stderr)
    return 0
