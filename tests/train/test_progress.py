from __future__ import annotations

import io

import pytest
from rich.console import Console

from halfbyte.train import progress
from halfbyte.train.progress import telling


def test_telling_says_nothing_of_what_is_soon_done() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with telling(console, "reading x") as tell:
        tell("10,000 rows")
    assert console.file.getvalue() == ""


def test_telling_says_how_far_it_is_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), force_terminal=False)
    with telling(console, "reading x") as tell:
        tell("10,000 rows")
        tell("20,000 rows")
    assert console.file.getvalue() == "reading x: 10,000 rows\nreading x: 20,000 rows\n"


def test_telling_changes_a_line_of_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with telling(console, "tokenising") as tell:
        tell("5 of 9 examples")
        # Drawn ten times a second by a thread; once more when it ends.
    assert "tokenising: 5 of 9 examples" in console.file.getvalue()
