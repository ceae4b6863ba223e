"""Where the demo's model is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import demo_model


def test_main_prefers_what_the_person_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HALFBYTE_DEMO_MODEL", "mine/model")
    assert demo_model.main() == 0
    assert capsys.readouterr().out == "mine/model\n"


def test_main_finds_an_unpacked_file_without_the_net(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("HALFBYTE_DEMO_MODEL", raising=False)
    monkeypatch.setattr(demo_model, "FOLDER", tmp_path)
    assert demo_model.unpacked_model() is None
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "Model.Q4_1.gguf"
    file.touch()
    assert demo_model.main() == 0
    assert capsys.readouterr().out == f"{file}\n"
