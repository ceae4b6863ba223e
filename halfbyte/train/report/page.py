"""The page: its head, its sections in order, and where it is written.

Nothing is fetched: style and script are in the file, and its Content-Security-Policy lets the browser run that one
script and load nothing, whatever the data say.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from halfbyte.config.output import REPORT_FILE, save_text
from halfbyte.train.report.figures import curves_section
from halfbyte.train.report.markup import Markup, element, join
from halfbyte.train.report.record import RunRecord
from halfbyte.train.report.sections import (
    answers_section,
    configuration_section,
    data_section,
    footer,
    header,
    headline_section,
    machine_section,
    notes_section,
)


def save_report(record: RunRecord) -> Path:
    """Write the report into the run's folder, whole or not at all, and return its path."""
    path = record.folder / REPORT_FILE
    save_text(render_page(record), path)
    return path


def render_page(record: RunRecord) -> str:
    """Return the whole page as HTML."""
    sections = (
        header(record),
        headline_section(record),
        curves_section(record),
        answers_section(record),
        data_section(record),
        configuration_section(record),
        notes_section(record),
        machine_section(record),
        footer(record),
    )
    script = _read("page.js")
    page = element(
        "html", _head(record, script), element("body", element("main", *sections), _script(script)), lang="en"
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _head(record: RunRecord, script: str) -> Markup:
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{record.name} - halfbyte"),
        element("style", Markup(_read("page.css"))),
    )


def _script(script: str) -> Markup:
    return join([element("script", Markup(script))])


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
