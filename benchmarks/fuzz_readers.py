"""Damages tens of thousands of files and counts, reader by reader, what comes of reading them.

    python -m benchmarks.fuzz_readers --seconds 480 > benchmarks/results/fuzz_readers.md

Every example is made from its number, so a defect is found again by `--only READER --first NUMBER --seconds 0`.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.outcomes import outcome_of
from tests.fuzz.targets import TARGETS, damage_file

OUTCOMES = ("result", "FormatError", "DataError", "ConfigError", "defect")


def fuzz(name: str, first: int, seconds: float) -> collections.Counter[str]:
    """Return how often each outcome came in so many seconds of CPU, one example at least; defects go to stderr."""
    target, counts = TARGETS[name], collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        target.files(Path(folder))
        valid = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        end = time.process_time() + seconds
        number = first
        while number == first or time.process_time() < end:
            damage_file(target, random.Random(number), valid, Path(folder))
            try:
                counts[outcome_of(target.read, Path(folder))] += 1
            except Exception:
                # Whatever is no error of ours is what is looked for: counted, shown, and the exit code.
                counts["defect"] += 1
                print(f"{name}, example {number}:\n{traceback.format_exc()}", file=sys.stderr)
            number += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="of CPU, for all readers together")
    parser.add_argument("--only", choices=list(TARGETS), help="one reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first example")
    args = parser.parse_args()
    names = [args.only] if args.only else list(TARGETS)
    print("# Damaged files, and what came of reading them\n")
    print(f"| reader | examples | {' | '.join(OUTCOMES)} |\n|---|{'---:|' * (len(OUTCOMES) + 1)}")
    total = collections.Counter[str]()
    for name in names:
        counts = fuzz(name, args.first, args.seconds / len(names))
        total += counts
        print(_row(name, counts), flush=True)
    print(_row("all", total))
    return 1 if total["defect"] else 0


def _row(name: str, counts: collections.Counter[str]) -> str:
    return f"| {name} | {counts.total()} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |"


if __name__ == "__main__":
    sys.exit(main())
