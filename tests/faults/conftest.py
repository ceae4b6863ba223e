"""A tiny model and examples for runs that will be harmed, and what the run comes to that nothing happens to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.processes import OPTIONS, Outcome, Training, make_source

Make = Callable[..., Training]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("reference") / "out"
    Training(source / "model", source / "tickets.jsonl", folder, (*OPTIONS, "--train.save_steps=1")).finish()
    return Outcome.of(folder)


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Make:
    """Make a run that the reference shows the end of."""

    def build(*options: str, save_steps: int | None = 1, folder: str = "out", data: Path | None = None) -> Training:
        words = (*OPTIONS, f"--train.save_steps={save_steps or 'none'}", *options)
        return Training(source / "model", data or source / "tickets.jsonl", tmp_path / folder, words)

    return build
