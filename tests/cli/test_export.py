from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.models import load_model
from tests.cli.conftest import Outcome
from tests.export.test_gguf_model import save

Run = Callable[..., Outcome]


def test_export_writes_a_file_and_a_modelfile(halfbyte: Run, tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    done = halfbyte("export", base, tmp_path / "out" / "model.gguf", "--type=q8_0")
    assert done.code == 0, done.err
    assert "matrices in Q8_0" in done.err
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    load_model(tmp_path / "out" / "model.gguf", quant=None, device="cpu")
    again = halfbyte("export", base, tmp_path / "out" / "other.gguf")
    assert "Modelfile is there already; name a file in another folder" in again.err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["model.bin"], "must end in .gguf"), (["m.gguf", "--type=q4_k_m"], "argument --type: invalid choice: 'q4_k_m'")],
)
def test_export_refuses_what_it_cannot_write(
    halfbyte: Run, model_folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    done = halfbyte("export", model_folder, tmp_path / words[0], *words[1:])
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []
