from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.models import load_model
from halfbyte.nn import LoraSpec
from tests.cli.conftest import Outcome
from tests.export.llama_cpp import save_speaking_tiny
from tests.export.test_merge import save_tuned

Run = Callable[..., Outcome]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    base = save_speaking_tiny(tmp_path / "base")
    save_tuned(base, tmp_path / "run", LoraSpec(rank=4, alpha=8))
    (tmp_path / "run" / "run.yaml").write_text(f"model:\n  path: {base}\ndata:\n  train: t\n  system: Be kind.\n")
    return tmp_path / "run"


def test_export_writes_a_merged_model(halfbyte: Run, run_folder: Path, tmp_path: Path) -> None:
    done = halfbyte("export", run_folder, tmp_path / "out" / "m.gguf", "--type=q8_0")
    assert done.code == 0
    assert "merged 14 adapters" in done.out + done.err
    assert load_model(tmp_path / "out" / "m.gguf", quant=None, device="cpu").model is not None
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./m.gguf\n")
    assert 'SYSTEM """Be kind."""' in text


def test_export_writes_an_adapter(halfbyte: Run, run_folder: Path, tmp_path: Path) -> None:
    done = halfbyte("export", run_folder, tmp_path / "a.gguf", "--adapter-only")
    assert done.code == 0
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./base\nADAPTER ./a.gguf\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.bin"], "must end in .gguf"),
        (["m.gguf", "--type=q4_k_m"], "argument --type: invalid choice: 'q4_k_m'"),
        (["m.gguf", "--adapter-only", "--onto=original"], "are for whole models"),
        (["m.gguf", "--adapter-only", "--type=q8_0"], "'Q8_0' of an adapter"),
        (["taken.gguf"], "taken.gguf is there already; name a file in another folder"),
        (["half/m.gguf"], "Modelfile is there already; name a file in another folder"),
    ],
)
def test_export_refuses_before_it_writes(
    halfbyte: Run, run_folder: Path, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.gguf").touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "Modelfile").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = halfbyte("export", run_folder, *words)
    assert done.code == 2
    assert message in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_export_of_a_plain_model_has_no_adapter(halfbyte: Run, run_folder: Path, tmp_path: Path) -> None:
    done = halfbyte("export", tmp_path / "base", tmp_path / "m.gguf", "--adapter-only")
    assert (done.code, "without an adapter" in done.err) == (2, True)
