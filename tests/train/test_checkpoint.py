from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte.errors import ConfigError, FormatError
from halfbyte.models import save_adapter
from halfbyte.nn import LoraSpec
from halfbyte.train.checkpoint import (
    check_run_state,
    list_checkpoints,
    load_tensors,
    read_random_state,
    remove_old_checkpoints,
    restore_adapter_,
    restore_random_state,
    write_folder,
)
from tests.train.runs import SPEC, assert_same_values, build_model, trained_values

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_random_state_comes_back_from_a_file(tmp_path: Path) -> None:
    draw()
    torch.save(read_random_state(CPU), tmp_path / "random.pt")
    expected = [draw() for _ in range(3)]
    restore_random_state(load_tensors(tmp_path / "random.pt"), CPU)
    assert [draw() for _ in range(3)] == expected


def test_random_state_of_another_device_is_refused() -> None:
    state = {**read_random_state(CPU), "cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(ConfigError, match="of a run on a GPU"):
        restore_random_state(state, CPU)


def fail_halfway(folder: Path) -> None:
    with write_folder(folder) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError("disk full")


def test_write_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    with write_folder(folder) as temporary:
        (temporary / "a").write_text("old")
        assert not folder.exists()
    with pytest.raises(RuntimeError, match="disk full"):
        fail_halfway(folder)
    assert (folder / "a").read_text() == "old"
    with write_folder(folder) as temporary:
        (temporary / "b").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_remove_old_checkpoints_counts_by_number_and_spares_the_best(tmp_path: Path) -> None:
    for step in (9, 10, 11, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    remove_old_checkpoints(tmp_path, keep=None, best=None)
    assert len(list_checkpoints(tmp_path)) == 4
    remove_old_checkpoints(tmp_path, keep=2, best=str(tmp_path / "checkpoint-9"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-11", "checkpoint-100"]
    assert (tmp_path / "checkpoint-of-mine").exists()


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_restore_adapter_takes_an_adapter_without_effect(tmp_path: Path, saved: tuple[str, ...]) -> None:
    spec = LoraSpec(rank=4, seed=1, modules_to_save=saved)
    model = build_model(spec=spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    save_adapter(model, tmp_path, base_model="tiny", spec=spec)
    before = trained_values(model)
    other = build_model(spec=LoraSpec(rank=4, seed=2, modules_to_save=saved))
    restore_adapter_(other, tmp_path)
    assert_same_values(before, trained_values(other))


def test_restore_adapter_refuses_other_layers_and_damage(tmp_path: Path) -> None:
    save_adapter(build_model(), tmp_path, base_model="tiny", spec=SPEC)
    with pytest.raises(FormatError, match="other layers"):
        restore_adapter_(build_model(spec=LoraSpec(rank=3, seed=1)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match="cannot be read"):
        restore_adapter_(build_model(), tmp_path)


def test_load_tensors_refuses_code_and_missing_files(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"x": Harmful()}, tmp_path / "optimizer.pt")
    with pytest.raises(FormatError, match="cannot be read as numbers and tensors"):
        load_tensors(tmp_path / "optimizer.pt")
    with pytest.raises(FormatError, match="not a whole checkpoint"):
        load_tensors(tmp_path / "scheduler.pt")


def test_check_run_state_names_what_differs(tmp_path: Path) -> None:
    (tmp_path / "run_state.json").write_text(json.dumps({"seed": 1, "data": "a"}))
    check_run_state(tmp_path, {"seed": 1, "data": "a"})
    with pytest.raises(ConfigError, match=r"another seed \(1, now 2\)"):
        check_run_state(tmp_path, {"seed": 2, "data": "a"})
