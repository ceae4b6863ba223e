from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.train.manifest import MANIFEST_FILE, find_damage, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.pt").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_find_damage_finds_none_where_there_is_none(folder: Path) -> None:
    assert find_damage(folder) is None


@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, -1])
def test_find_damage_sees_every_flipped_bit(folder: Path, place: int) -> None:
    content = bytearray((folder / "a.pt").read_bytes())
    content[place] ^= 1
    (folder / "a.pt").write_bytes(content)
    assert find_damage(folder) == "the checksum of a.pt differs"


def test_find_damage_sees_missing_and_broken_off_files(folder: Path) -> None:
    (folder / "a.pt").write_bytes((folder / "a.pt").read_bytes()[:-1])
    assert find_damage(folder) == "a.pt has 1,279,999 bytes instead of 1280000"
    (folder / "a.pt").unlink()
    assert find_damage(folder) == "a.pt is missing"


def test_find_damage_sees_a_damaged_manifest(folder: Path) -> None:
    text = (folder / MANIFEST_FILE).read_text()
    for damaged in (text[:-10], "[]", "{}", '{"files": []}', '{"files": {"a.pt": 3}}', text.replace("a.pt", "a.pu")):
        (folder / MANIFEST_FILE).write_text(damaged)
        assert find_damage(folder) is not None
    (folder / MANIFEST_FILE).write_bytes(b"\xff\xfe")
    assert find_damage(folder) == "manifest.json cannot be read"
    (folder / MANIFEST_FILE).unlink()
    assert find_damage(folder) == "manifest.json is missing"
