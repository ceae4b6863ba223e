"""What a run tells the loggers that `train.report_to` names: one run through the command, read by each library."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from halfbyte.config.load import make_config
from halfbyte.errors import ConfigError
from halfbyte.train import HalfbyteArguments, run_training

OPTIONAL = ("wandb", "mlflow", "trackio")
SECRETS = {
    "HF_TOKEN": "hf_tokenthatnobodymaysee0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_TOKEN": "mlflowtokenthatnobodymaysee",
    "MLFLOW_TRACKING_PASSWORD": "passwordthatnobodymaysee",
}
STEPS = 3


@pytest.fixture(scope="module")
def run_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once with every logger that is installed, and return the folder that holds run and logs."""
    folder = tmp_path_factory.mktemp("loggers")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * n}."} for n in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loggers = ["tensorboard", *filter(importlib.util.find_spec, OPTIONAL)]
    (folder / "wandb").mkdir()
    words = [sys.executable, "-m", "halfbyte", "train", str(model_folder), "data.jsonl", "--output", "out"]
    words += ["--model.device=cpu", "--data.max_length=128", "--data.held_out_fraction=0.2", "--train.num_samples=0"]
    words += [f"--train.max_steps={STEPS}", f"--train.report_to={','.join(loggers)}"]
    environment = {
        **os.environ,
        **SECRETS,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder / "wandb"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def losses(run_folder: Path) -> list[float]:
    """Return the losses of the steps as the run itself wrote them down."""
    state = json.loads((run_folder / f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
    found = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(found) == STEPS
    return found


def need(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install -e '.[loggers]'")


def test_tensorboard_is_told_every_step(run_folder: Path, losses: list[float]) -> None:
    events = EventAccumulator(str(run_folder / "out" / "logs"))
    events.Reload()
    # TensorBoard keeps float32.
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert {"train/tokens_per_second", "train/learning_rate", "eval/loss"} <= set(events.Tags()["scalars"])


def test_wandb_is_told_every_step(run_folder: Path, losses: list[float]) -> None:
    need("wandb")
    (file,) = (run_folder / "wandb").rglob("*.wandb")
    history = list(wandb_history(file))
    assert [json.loads(row["train/loss"]) for row in history if "train/loss" in row] == losses
    assert any("eval/loss" in row for row in history)


def test_mlflow_is_told_every_step(run_folder: Path, losses: list[float]) -> None:
    need("mlflow")
    with sqlite3.connect(run_folder / "mlflow.db") as database:
        rows = database.execute("select value from metrics where key = 'loss' order by step").fetchall()
        options = dict(database.execute("select key, value from params").fetchall())
        states = database.execute("select status from runs").fetchall()
    assert [value for (value,) in rows] == losses
    assert options["max_steps"] == str(STEPS)
    assert states == [("FINISHED",)]


def test_trackio_is_told_every_step(run_folder: Path, losses: list[float]) -> None:
    need("trackio")
    (file,) = (run_folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == losses


def test_no_logger_and_no_file_of_a_run_holds_a_secret(run_folder: Path) -> None:
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        found = [name for name, secret in SECRETS.items() if secret.encode() in content]
        assert not found, f"{path.relative_to(run_folder)} holds {found}"


def test_arguments_tell_loggers_no_tokens(tmp_path: Path) -> None:
    arguments = HalfbyteArguments(str(tmp_path), hub_token=SECRETS["HF_TOKEN"], use_cpu=True)
    assert SECRETS["HF_TOKEN"] not in str(arguments.to_dict()) + str(arguments) + arguments.to_json_string()


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("tensorbord", "report_to: no logger 'tensorbord'; did you mean tensorboard"),
        ("clearml", "report_to: clearml is not installed; pip install clearml"),
    ],
)
def test_a_logger_that_is_not_there_is_an_error_before_anything_else(
    logger: str, message: str, model_folder: Path, tmp_path: Path
) -> None:
    options = {"model.path": str(model_folder), "data.train": "no-such-file.jsonl", "output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=message):
        run_training(make_config({**options, "model.device": "cpu", "train.report_to": (logger,)}))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=message):
        HalfbyteArguments(str(tmp_path), report_to=logger, use_cpu=True)


def wandb_history(file: Path) -> Iterator[dict[str, str]]:
    """Yield what was logged, read from an offline run's file.

    It is a LevelDB log: blocks of 32 KiB, records of a checksum (4 bytes), length (2) and kind (1 whole, 2 first,
    3 middle, 4 last), the first block beginning with 7 bytes of header.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                yield {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
