from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import ConfigError
from halfbyte.export.folder import new_folder


@pytest.mark.parametrize("exists", [True, False])
def test_new_folder_appears_whole(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "a" / "out"
    if exists:
        target.mkdir(parents=True)
    with new_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not (target / "x").exists()
    assert (target / "x").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_new_folder_vanishes_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out") as folder:
        (folder / "nowhere" / "x").write_text("1")
    assert not list(tmp_path.iterdir())


def test_new_folder_refuses_what_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    with pytest.raises(ConfigError, match="not empty"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(ConfigError, match="is a file"), new_folder(tmp_path / "out" / "x"):
        pass
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "y").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["y"]


def test_new_folder_keeps_the_old_one_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "x").read_text() == "old"
