"""Disks that are full, lose their folder, or give back other bytes than were written; and data that changes."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.faults.conftest import Make
from tests.faults.processes import Child, Outcome, newest_whole_step

# More than a run says, less than its adapter and its optimizer state are.
FEW_BYTES = 20_000


def limit_files(child: Child, limit_bytes: int) -> None:
    """Let no file of a running process grow beyond a limit: to whoever writes, a full disk."""
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


def test_full_disk_while_saving_is_told_and_survived(make: Make, reference: Outcome) -> None:
    run = make()
    child = run.start()
    child.wait_for("saved checkpoint-2")
    limit_files(child, FEW_BYTES)
    child.wait_for("it could not be written")
    step = newest_whole_step(run.folder)
    assert step >= 2
    failure = next(line for line in child.text.splitlines() if "it could not be written" in line)
    assert failure.startswith(f"checkpoint-{step + 1}: it could not be written: File too large")
    assert f"checkpoint-{step} is kept; training goes on" in failure
    limit_files(child, resource.RLIM_INFINITY)
    assert child.wait() == 0, child.text
    assert not list(run.folder.glob(".*.tmp"))
    Outcome.of(run.folder).assert_equal(reference)


def test_full_disk_at_the_end_says_how_to_get_the_results(make: Make, reference: Outcome) -> None:
    run = make()
    child = run.start()
    child.wait_for("saved checkpoint-25")
    limit_files(child, FEW_BYTES)
    assert child.wait() == 2
    last = child.text.splitlines()[-1]
    assert last.startswith("halfbyte: error: the results of the run could not be written: File too large")
    step = newest_whole_step(run.folder)
    assert f"it goes on from {run.folder / f'checkpoint-{step}'}" in last
    run.finish()
    Outcome.of(run.folder).assert_equal(reference)


def test_folder_that_cannot_be_made_is_an_error_before_the_first_step(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = make(folder="file/out")
    child = run.start(log=tmp_path / "log")
    assert child.wait() == 2
    assert child.text.splitlines()[-1] == (
        f"halfbyte: error: {run.folder} cannot be made: Not a directory; name another folder with --output"
    )


def test_folder_that_vanishes_is_made_anew(make: Make, reference: Outcome, tmp_path: Path) -> None:
    run = make()
    child = run.start()
    child.wait_for("saved checkpoint-3")
    run.folder.rename(tmp_path / "elsewhere")
    assert child.wait() == 0, child.text
    Outcome.of(run.folder).assert_equal(reference)


def test_run_whose_folder_vanished_goes_on_by_its_checkpoint(make: Make, reference: Outcome, tmp_path: Path) -> None:
    run = make()
    child = run.start()
    child.wait_for("saved checkpoint-3")
    run.folder.rename(tmp_path / "elsewhere")
    child.wait_until(lambda: child.saved_step > 5)
    child.kill()
    assert not (run.folder / "run.yaml").exists()
    assert "going on after step" in run.finish().text
    Outcome.of(run.folder).assert_equal(reference)


def test_folder_that_becomes_unwritable_is_told(make: Make, reference: Outcome, tmp_path: Path) -> None:
    """As root may write where permissions forbid it, a file takes the folder's place."""
    run = make()
    child = run.start()
    child.wait_for("saved checkpoint-3")
    run.folder.rename(tmp_path / "elsewhere")
    run.folder.write_text("")
    child.wait_for("it could not be written")
    assert child.wait() == 2
    assert "the results of the run could not be written" in child.text.splitlines()[-1]
    run.folder.unlink()
    (tmp_path / "elsewhere").rename(run.folder)
    run.finish()
    Outcome.of(run.folder).assert_equal(reference)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("optimizer.pt", "flip"),
        ("adapter_model.safetensors", "cut"),
        ("trainer_state.json", "flip"),
        ("manifest.json", "cut"),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    make: Make, reference: Outcome, name: str, harm: str
) -> None:
    run = make()
    child = run.start()
    child.wait_until(lambda: child.saved_step >= 4)
    child.kill()
    last = newest_whole_step(run.folder)
    path = run.folder / f"checkpoint-{last}" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content[:-7] if harm == "cut" else content)
    child = run.finish()
    assert f"checkpoint-{last} is damaged: " in child.text
    assert name in child.text.split("is damaged: ")[1].splitlines()[0]
    assert f"going on after step {last - 1}" in child.text
    assert (run.folder / f"checkpoint-{last}.damaged").is_dir()
    Outcome.of(run.folder).assert_equal(reference)


def test_run_begins_anew_where_every_checkpoint_is_damaged(make: Make, reference: Outcome) -> None:
    run = make()
    child = run.start()
    child.wait_until(lambda: child.saved_step >= 2)
    child.kill()
    for path in run.folder.glob("checkpoint-*/optimizer.pt"):
        path.write_bytes(b"")
    assert "is whole, so the run begins anew" in run.finish().text
    Outcome.of(run.folder).assert_equal(reference)


def test_data_that_changed_between_two_runs_is_refused(make: Make, reference: Outcome, tmp_path: Path) -> None:
    data = tmp_path / "tickets.jsonl"
    run = make(data=data)
    shutil.copyfile(make().data, data)
    child = run.start()
    child.wait_until(lambda: child.saved_step >= 2)
    child.kill()
    text = data.read_text()
    data.write_text(text.replace('"red"', '"green"', 1))
    child = run.start()
    assert child.wait() == 2
    assert "the training examples are not those of the run" in child.text.splitlines()[-1]
    data.write_text(text)
    run.finish()
    Outcome.of(run.folder).assert_equal(reference)


def test_base_whose_weights_changed_between_two_runs_is_refused(
    make: Make, reference: Outcome, source: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(source / "model", model)
    run = dataclasses.replace(make(), model=model)
    child = run.start()
    child.wait_until(lambda: child.saved_step >= 2)
    child.kill()
    path = model / "model.safetensors"
    content = path.read_bytes()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name] * 1.01}, path, metadata={"format": "pt"})
    child = run.start()
    assert child.wait() == 2
    assert "the weights of the base model are not those of the run" in child.text.splitlines()[-1]
    assert "Traceback" not in child.text
    path.write_bytes(content)
    run.finish()
    Outcome.of(run.folder).assert_equal(reference)


def test_other_options_are_named_and_those_without_effect_are_not(make: Make, reference: Outcome) -> None:
    run = make()
    child = run.start()
    child.wait_until(lambda: child.saved_step >= 2)
    child.kill()
    child = make("--train.seed=1", "--lora.alpha=8").start()
    assert child.wait() == 2
    assert "holds a run with other options: lora.alpha was " in child.text
    assert "now 8.0; train.seed was 42, now 1. To go on" in child.text
    free = ["--train.eval_steps=5", "--train.dataloader_num_workers=2", "--train.save_total_limit=none"]
    make(*free, save_steps=4).finish()
    found = Outcome.of(run.folder)
    assert [entry for entry in found.log if "loss" in entry] == [entry for entry in reference.log if "loss" in entry]
    assert {path.name for path in run.folder.glob("checkpoint-*")} >= {
        "checkpoint-20",
        "checkpoint-24",
        "checkpoint-27",
    }
