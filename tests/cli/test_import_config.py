from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


@pytest.fixture
def axolotl_file(model_folder: Path, examples_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "axolotl.yml"
    path.write_text(
        f"base_model: {model_folder}\nadapter: qlora\nload_in_4bit: true\nlora_r: 4\nlora_alpha: 8\n"
        f"lora_target_linear: true\nlearning_rate: 1e-3\nmax_steps: 2\nsequence_len: 64\nsample_packing: true\n"
        f"datasets:\n  - path: {examples_file}\n    type:\n      field_instruction: question\n"
        f"      field_output: answer\noutput_dir: {tmp_path / 'run'}\nval_set_size: 0.1\nbf16: false\n"
    )
    return path


def test_what_is_imported_trains(halfbyte: Run, axolotl_file: Path, tmp_path: Path) -> None:
    done = halfbyte("import-config", axolotl_file)
    assert done.code == 0
    assert f"{axolotl_file}:4: lora_r -> lora.rank=4" in done.err
    (tmp_path / "run.yaml").write_text(done.out)
    trained = halfbyte("train", tmp_path / "run.yaml", "--train.num_samples=0", "--train.report_to=none")
    assert trained.code == 0, trained.err
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_import_config_writes_nothing_for_what_is_not_supported(
    halfbyte: Run, axolotl_file: Path, tmp_path: Path
) -> None:
    axolotl_file.write_text(axolotl_file.read_text() + "deepspeed: zero3.json\n")
    output = tmp_path / "imported.yaml"
    done = halfbyte("import-config", axolotl_file, "--output", output)
    assert (done.code, done.out, output.exists()) == (2, "", False)
    assert "deepspeed: NOT SUPPORTED: under torchrun" in done.err
    assert "error: not supported: deepspeed; --allow-unsupported leaves them out" in done.err
    done = halfbyte("import-config", axolotl_file, "--output", output, "--allow-unsupported")
    assert (done.code, done.out) == (0, "")
    assert "# Left out: deepspeed, line 19: NOT SUPPORTED: under torchrun" in output.read_text()
    again = halfbyte("import-config", axolotl_file, "--output", output, "--allow-unsupported")
    assert (again.code, "exists; name another file" in again.err) == (2, True)


def test_import_config_knows_whose_file_it_is(halfbyte: Run, axolotl_file: Path) -> None:
    done = halfbyte("import-config", axolotl_file, "--from=llama-factory")
    assert (done.code, "model_name_or_path is not set" in done.err) == (2, True)
    assert "invalid choice: 'trl'" in halfbyte("import-config", axolotl_file, "--from=trl").err
