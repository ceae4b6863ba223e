from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from halfbyte.errors import FormatError
from halfbyte.models.pickle_file import MAX_NAME_CHARACTERS, load_pickle


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.witness), "w")


@pytest.mark.parametrize("is_zip", [True, False])
def test_load_pickle_reads_what_torch_saved(tmp_path: Path, is_zip: bool) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16)}
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    loaded = load_pickle(tmp_path / "x.bin")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("is_zip", [True, False])
def test_load_pickle_refuses_code_and_runs_none(tmp_path: Path, is_zip: bool) -> None:
    witness = tmp_path / "witness"
    torch.save({"a": torch.ones(2), "b": RunsCode(witness)}, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(FormatError, match=r"x\.bin is a pickle that holds code"):
        load_pickle(tmp_path / "x.bin")
    assert not witness.exists()


def test_load_pickle_refuses_a_bare_pickle_with_code(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (tmp_path / "x.bin").write_bytes(pickle.dumps(RunsCode(witness), protocol=2))
    with pytest.raises(FormatError, match=r"x\.bin"):
        load_pickle(tmp_path / "x.bin")
    assert not witness.exists()


def test_load_pickle_refuses_a_damaged_file(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(100)}, tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:200])
    with pytest.raises(FormatError, match=r"x\.bin"):
        load_pickle(tmp_path / "x.bin")


def test_load_pickle_refuses_anything_but_named_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "x.bin")
    with pytest.raises(FormatError, match="something else than named tensors"):
        load_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("is_zip", [True, False])
def test_load_pickle_refuses_endless_names(tmp_path: Path, is_zip: bool) -> None:
    """Which torch would search through for minutes, making up its message."""
    path = tmp_path / "x.bin"
    torch.save({"a" * MAX_NAME_CHARACTERS: torch.ones(2)}, path, _use_new_zipfile_serialization=is_zip)
    assert list(load_pickle(path)) == ["a" * MAX_NAME_CHARACTERS]
    torch.save({"a" * 200_000: torch.ones(2)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(FormatError, match="holds a name of 200000 characters"):
        load_pickle(path)
