"""halfbyte schema: the JSON schema of run.yaml."""

from __future__ import annotations

import argparse
import json

from halfbyte.cli.arguments import CommandParser
from halfbyte.config.schema import make_schema

SECTIONS = ()


def add_arguments(parser: CommandParser) -> None:
    parser.epilog = "example: halfbyte schema > run.schema.json"


def run(args: argparse.Namespace) -> int:
    print(json.dumps(make_schema(), indent=1))
    return 0
