"""halfbyte doctor: what this machine has, what works on it, and one training step as a proof."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.console import json_text, printable, progress_console
from halfbyte.cli.diagnosis import Diagnosis, examine
from halfbyte.cli.trial_step import TrialStep, try_step
from halfbyte.errors import hide_logins

SECTIONS = ()
EXPLANATION = """
Exit code 0 if the training step works, 1 if it does not. What it prints names no files of yours and can be pasted into
a bug report as it is.
"""


def add_arguments(parser: CommandParser) -> None:
    parser.usage = "halfbyte doctor [--json]"
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.epilog = EXPLANATION


def run(args: argparse.Namespace) -> int:
    console = progress_console()
    with console.status("looking at the machine"):
        diagnosis = examine()
    with console.status("training one step"):
        step = try_step()
    if args.json:
        print(hide_private(json_text({**dataclasses.asdict(diagnosis), "step": dataclasses.asdict(step)})))
    else:
        print(hide_private(show(diagnosis, step)))
    return 0 if step.works else 1


def show(diagnosis: Diagnosis, step: TrialStep) -> str:
    """Return the findings for people, in the form of a bug report."""
    sections = {
        "machine": _table(diagnosis.machine),
        "versions": _table(diagnosis.versions),
        "works": _table({one.name: one.text for one in diagnosis.abilities if one.works}),
        "does not": _table({one.name: one.text for one in diagnosis.abilities if not one.works}) or "  nothing",
        f"one training step, {step.seconds:.1f} s": _indent(f"{'works' if step.works else 'FAILS'}, {step.text}"),
    }
    body = "\n\n".join(f"{title}\n{text}" for title, text in sections.items())
    verdict = "halfbyte trains on this machine." if step.works else "halfbyte does not train on this machine."
    return f"{body}\n\n{verdict} For a bug report, paste all of the above."


def hide_private(text: str) -> str:
    """Return text without logins, and without the name of the home folder, which is often a person's."""
    home, text = str(Path.home()), hide_logins(text)
    return text.replace(home, "~") if len(home) > 1 else text


def _table(facts: Mapping[str, str]) -> str:
    width = max((len(name) for name in facts), default=0)
    return "\n".join(f"  {name:<{width}}  {printable(text)}" for name, text in facts.items())


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in printable(text).splitlines())
