"""Commands that read and tokenise examples say how far they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.train import progress
from tests.cli.conftest import Outcome


@pytest.mark.parametrize("command", ["data", "eval", "quantize", "plan"])
def test_command_says_how_many_examples_are_tokenised(
    command: str,
    halfbyte: Callable[..., Outcome],
    model_folder: Path,
    examples_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    words = {
        "data": [examples_file, "--model", model_folder],
        "eval": [model_folder, examples_file, "--data.max_length=128"],
        "quantize": [model_folder, tmp_path / "nf4", "--calibrate", examples_file, "--rows=2"],
        "plan": [model_folder, examples_file, "--gpu=24GiB", "--data.max_length=64"],
    }
    done = halfbyte(command, *words[command])
    assert done.code == 0, done.err
    assert "tokenising: 24 of 24 examples" in done.err
    assert "tokenising" not in done.out
