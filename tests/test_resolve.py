"""Where a run goes, and when it goes on with one that was cut short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import (
    DataSection,
    ModelSection,
    RunConfig,
    TrainSection,
    load_config,
    resolve_output_dir,
    save_run_config,
)
from halfbyte.config.describe import list_options
from halfbyte.config.held import hold, is_held
from tests.test_config import refused


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(output: str | None = None, **train: Any) -> RunConfig:
    return RunConfig(
        model=ModelSection(path="Hub/My-Model 1.5B/"),
        data=DataSection(train="dir/Tickets 2.jsonl"),
        train=TrainSection(**train),
        output_dir=output,
    )


def test_resolve_output_dir_counts_up(in_folder: Path) -> None:
    first = "runs/my-model-1.5b-tickets-2-1"
    assert resolve_output_dir(run_of()).output_dir == first
    Path(first).mkdir(parents=True)
    Path("runs/my-model-1.5b-tickets-2-x").mkdir()
    assert resolve_output_dir(run_of()).output_dir == "runs/my-model-1.5b-tickets-2-2"


@pytest.mark.parametrize("name", ["adapter_config.json", "summary.json", "checkpoint-5"])
def test_resolve_output_dir_refuses_a_run_that_it_cannot_go_on_with(in_folder: Path, name: str) -> None:
    (Path("out") / name).mkdir(parents=True)
    kind = "a finished" if name == "summary.json" else "a"
    with refused(f"out already holds {kind} run; replace it with --overwrite, or name another folder"):
        resolve_output_dir(run_of("out"))
    assert resolve_output_dir(run_of("out", overwrite=True)).output_dir == "out"


def leave_run(folder: str, *, checkpoints: Sequence[int] = (), **train: Any) -> None:
    """Leave what a run that was killed leaves."""
    for step in checkpoints:
        (Path(folder) / f"checkpoint-{step}").mkdir(parents=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_run_config(run_of(folder, **train), folder)


def test_resolve_output_dir_goes_on_with_the_same_run(in_folder: Path) -> None:
    leave_run("out", checkpoints=[3], learning_rate=1e-3)
    same = {"learning_rate": 1e-3, "save_steps": 7, "logging_steps": 1, "dataloader_num_workers": 2, "report_to": ()}
    found = resolve_output_dir(run_of("out", **same))
    assert found.train.resume is True
    assert resolve_output_dir(found) == found
    assert resolve_output_dir(load_config("out/run.yaml")).train.resume is True
    with refused("out already holds a run"):
        resolve_output_dir(run_of("out", learning_rate=1e-3, resume=False))
    Path("out/summary.json").write_text("{}")
    with refused("out already holds a finished run"):
        resolve_output_dir(run_of("out", learning_rate=1e-3))
    assert resolve_output_dir(run_of("out", learning_rate=1e-3, resume=True)).train.resume is True


def test_resolve_output_dir_begins_anew_where_nothing_was_saved(in_folder: Path) -> None:
    leave_run("out")
    assert resolve_output_dir(run_of("out")).train.resume == "auto"
    with refused("holds a run with other options: train.seed was 42, now 1"):
        resolve_output_dir(run_of("out", seed=1))


def test_resolve_output_dir_names_every_other_option_and_the_ways_out(in_folder: Path) -> None:
    leave_run("out", checkpoints=[3], max_steps=10)
    with refused(
        "out holds a run with other options: train.max_steps was 10, now 20; train.warmup_steps was none, now 3; "
        "train.seed was 42, now 1. To go on with it, give these as they were (halfbyte train out/run.yaml); otherwise "
        "replace it with --overwrite, or name another folder with --output"
    ):
        resolve_output_dir(run_of("out", max_steps=20, seed=1, warmup_steps=3, save_steps=2))
    assert resolve_output_dir(run_of("out", max_steps=20, resume=True)).train.resume is True
    with refused("options: train.seed was 42, now 1. To"):
        resolve_output_dir(run_of("out", max_steps=20, seed=1, resume=True))


def test_resolve_output_dir_knows_a_batch_that_the_plan_has_divided(in_folder: Path) -> None:
    leave_run("out", checkpoints=[3], per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert resolve_output_dir(run_of("out", batch_size=12)).train.resume is True
    with refused("train.batch_size was none, now 24"):
        resolve_output_dir(run_of("out", batch_size=24))


def test_resolve_output_dir_finds_options_in_a_checkpoint(in_folder: Path) -> None:
    leave_run("out", checkpoints=[3, 12], seed=5)
    Path("out/run.yaml").rename("out/checkpoint-12/run.yaml")
    assert resolve_output_dir(run_of("out", seed=5)).train.resume is True
    with refused("train.seed was 5, now 42"):
        resolve_output_dir(run_of("out"))


def test_resolve_output_dir_goes_on_in_the_last_folder_of_its_own(in_folder: Path) -> None:
    stem = "runs/my-model-1.5b-tickets-2"
    leave_run(f"{stem}-1", checkpoints=[3])
    assert resolve_output_dir(run_of()).output_dir == f"{stem}-1"
    assert resolve_output_dir(run_of(resume=False)).output_dir == f"{stem}-2"
    assert resolve_output_dir(run_of(seed=1)).output_dir == f"{stem}-2"
    assert resolve_output_dir(run_of(overwrite=True)).output_dir == f"{stem}-2"
    Path(f"{stem}-1/summary.json").write_text("{}")
    assert resolve_output_dir(run_of()).output_dir == f"{stem}-2"


def test_options_that_do_not_decide_the_result_are_few() -> None:
    free = {option.full_name for option in list_options() if not option.decides_result}
    memory = "gpu host streamed_blocks sharded spill_folder embedding_on_host"
    train = (
        "per_device_eval_batch_size gradient_checkpointing logging_steps eval_steps save_steps save_total_limit "
        "report_to dataloader_num_workers on_bad_step loss_spike num_samples max_sample_tokens resume overwrite"
    )
    expected = {*(f"memory.{name}" for name in memory.split()), *(f"train.{name}" for name in train.split())}
    assert free == expected | {"output_dir"}


def test_hold_lets_one_process_into_a_folder(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.config.held.PATIENCE_SECONDS", 0.1)
    leave_run("runs/my-model-1.5b-tickets-2-1", checkpoints=[3])
    folder = Path("runs/my-model-1.5b-tickets-2-1")
    with hold(folder):
        assert is_held(folder)
        with refused("another process is training into"), hold(folder):
            pass
        assert resolve_output_dir(run_of()).output_dir == "runs/my-model-1.5b-tickets-2-2"
    assert not is_held(folder)


def test_resolve_output_dir_refuses_models_and_files(in_folder: Path) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    with refused("model already holds a model"):
        resolve_output_dir(run_of("model", overwrite=True))
    with refused("config.json is a file; name a folder to write to"):
        resolve_output_dir(run_of("model/config.json"))


def test_resolve_output_dir_resumes_the_last_run_only_where_it_has_a_checkpoint(in_folder: Path) -> None:
    with refused("holds no checkpoint; leave --resume out"):
        resolve_output_dir(run_of(resume=True))
    Path("runs/my-model-1.5b-tickets-2-9/checkpoint-3").mkdir(parents=True)
    Path("runs/my-model-1.5b-tickets-2-10/checkpoint-3").mkdir(parents=True)
    assert resolve_output_dir(run_of(resume=True)).output_dir == "runs/my-model-1.5b-tickets-2-10"
