"""halfbyte runs: what has been trained here, and what came of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import json_text
from halfbyte.cli.past_runs import SORTINGS, draw_table, find_runs, read_run, sort_runs
from halfbyte.config.output import RUNS_FOLDER
from halfbyte.errors import ConfigError

SECTIONS = ()
EXAMPLES = """
examples:
  halfbyte runs
  halfbyte runs experiments --sort loss
  halfbyte runs --json | jq '.[0].held_out_after'

A loss is in nats a token, over the examples that a run held out: compare only runs that held out the same.
"""


def add_arguments(parser: CommandParser) -> None:
    parser.usage = "halfbyte runs [FOLDER] [options]"
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default=str(RUNS_FOLDER),
        help=f"folder of runs, or of one; default: {RUNS_FOLDER}",
    )
    parser.add_argument(
        "--sort", choices=tuple(SORTINGS), default="date", help="newest, lowest loss or name first; default: date"
    )
    parser.add_argument("--json", action="store_true", help="everything as a JSON array")
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    found, broken = [], []
    for folder in find_runs(Path(args.folder)):
        try:
            found.append(read_run(folder))
        except ConfigError as error:
            broken.append(str(error))
    found = sort_runs(found, by=args.sort)
    if args.json:
        print(json_text([one.as_dict() for one in found]))
    elif found:
        print(draw_table(found))
    else:
        print(f"no runs in {args.folder}")
    for message in broken:
        print(f"halfbyte: not listed: {message}", file=sys.stderr)
    return 2 if broken else 0
