from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from halfbyte.errors import ConfigError, FormatError
from halfbyte.models import save_adapter
from halfbyte.nn import LoraSpec
from halfbyte.train.checkpoint import (
    best_step,
    check_run_state,
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    remove_leftovers,
    remove_old_checkpoints,
    restore_adapter_,
    write_folder,
)
from halfbyte.train.manifest import write_manifest
from tests.train.runs import SPEC, assert_same_values, build_model, trained_values


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


def test_remove_old_checkpoints_counts_by_number_and_spares_some(tmp_path: Path) -> None:
    for age, step in enumerate((9, 10, 11, 100)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        # A clock that runs backwards.
        os.utime(tmp_path / f"checkpoint-{step}", (10**9 - age, 10**9 - age))
    (tmp_path / "checkpoint-of-mine").mkdir()
    remove_old_checkpoints(tmp_path, keep=None, spared=())
    assert len(list_checkpoints(tmp_path)) == 4
    remove_old_checkpoints(tmp_path, keep=2, spared={9})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-11", "checkpoint-100"]
    assert (tmp_path / "checkpoint-of-mine").exists()


def test_remove_leftovers_takes_what_a_crash_left(tmp_path: Path) -> None:
    for name in (".checkpoint-3.17.new.tmp", ".checkpoint-1.17.old.tmp", "checkpoint-2", ".mine.tmp"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "checkpoint-2"]


def test_best_step_is_that_of_the_lowest_held_out_loss_with_a_checkpoint() -> None:
    log = [
        {"step": 1, "loss": 0.1},
        {"step": 2, "eval_loss": 0.5},
        {"step": 3, "eval_loss": 0.2},
        {"step": 4, "eval_loss": 0.4},
        {"step": 5, "eval_loss": 0.9},
    ]
    assert best_step(log, {1, 2, 4, 5}) == 4
    assert best_step(log, {1}) is None
    assert best_step([], {1}) is None


def test_find_checkpoint_passes_over_damaged_ones_and_names_them(tmp_path: Path) -> None:
    for step in (2, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(bytes(100))
        write_manifest(folder)
    (tmp_path / "checkpoint-11" / "optimizer.pt").write_bytes(bytes(99) + b"x")
    told: list[str] = []
    assert find_checkpoint(tmp_path, told.append) == tmp_path / "checkpoint-10"
    assert "checkpoint-11 is damaged: the checksum of optimizer.pt differs" in told[0]
    assert (tmp_path / "checkpoint-11.damaged" / "optimizer.pt").exists()
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_bytes(bytes(50))
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    assert find_checkpoint(tmp_path, told.append) is None
    assert "optimizer.pt has 50 bytes instead of 100" in told[1]
    assert "checkpoint-2 is damaged: optimizer.pt is missing" in told[2]
    assert list_checkpoints(tmp_path) == []


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


@pytest.mark.parametrize(
    ("name", "message"),
    [("data", "the training examples are not those"), ("base", "the weights of the base model are not those")],
)
def test_check_run_state_says_what_was_exchanged(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run_state.json").write_text(json.dumps({name: "a", "cpu_threads": 2}))
    assert check_run_state(tmp_path, {name: "a"})["cpu_threads"] == 2
    with pytest.raises(ConfigError, match=f"{message} of the run .* begin anew with --overwrite"):
        check_run_state(tmp_path, {name: "b"})


def test_check_run_state_goes_on_with_a_checkpoint_from_before_bases_were_compared(tmp_path: Path) -> None:
    (tmp_path / "run_state.json").write_text(json.dumps({"data": "a"}))
    check_run_state(tmp_path, {"data": "a", "base": "b"})
    with pytest.raises(ConfigError, match="another seed"):
        check_run_state(tmp_path, {"data": "a", "base": "b", "seed": 1})
