"""Tokens, keys and passwords: whatever a command prints or writes, none of them is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.errors import ConfigError, hide_logins
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
PASSWORD = "passwordthatnobodymaysee"
SECRETS = {
    "HF_TOKEN": "hf_tokenthatnobodymaysee0123456789",
    "HUGGING_FACE_HUB_TOKEN": "hf_oldtokenthatnobodymaysee0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "keythatnobodymaysee",
    "HTTPS_PROXY": f"http://somebody:{PASSWORD}@127.0.0.1:9",
    "PIP_INDEX_URL": f"https://somebody:{PASSWORD}@127.0.0.1:9/simple",
}
URL = f"https://somebody:{PASSWORD}@127.0.0.1:9"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def assert_silent(text: str | bytes, where: str) -> None:
    """Fail if a text holds a secret."""
    content = text.encode() if isinstance(text, str) else text
    found = [name for name, secret in {**SECRETS, "password": PASSWORD}.items() if secret.encode() in content]
    assert not found, f"{where} tells {found}"


def test_no_file_and_no_line_of_a_run_holds_a_secret(
    halfbyte: Run, model_folder: Path, examples_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    words = ["train", model_folder, examples_file, "--output", folder, "--model.device=cpu", "--data.max_length=64"]
    words += ["--train.save_steps=1", "--train.num_samples=1", "--train.max_sample_tokens=4"]
    words += ["--data.held_out_fraction=0.1"]
    commands = ([*words, "--train.max_steps=2"], [*words, "--train.max_steps=3", "--resume"], ["runs", tmp_path])
    for done in (halfbyte(*command) for command in commands):
        assert done.code == 0, done.err
        assert_silent(done.out + done.err, "a command")
    written = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert names >= {"run.yaml", "summary.json", "report.html", "trainer_state.json", "adapter_config.json"}
    assert any(name.startswith("events.out") for name in names)
    for path in written:
        assert_silent(path.read_bytes(), str(path))


def test_doctor_tells_no_secret(halfbyte: Run) -> None:
    for options in ([], ["--json"]):
        done = halfbyte("doctor", *options)
        assert done.code == 0
        assert_silent(done.out + done.err, "the doctor")


def test_doctor_tells_no_login_that_a_failing_step_has_told(halfbyte: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"raise RuntimeError('cannot reach {URL}/simple')"
    monkeypatch.setattr("halfbyte.cli.trial_step.COMMAND", (sys.executable, "-c", code))
    for options in ([], ["--json"]):
        done = halfbyte("doctor", *options)
        assert "cannot reach https://***@127.0.0.1:9/simple" in done.out
        assert_silent(done.out + done.err, "the doctor")


@pytest.mark.parametrize(
    ("model", "data"),
    [(f"{URL}/model", None), (None, f"{URL}/tickets.jsonl"), (None, f"{URL}/tickets"), (f"{URL}/model.gguf", None)],
)
def test_login_in_a_path_is_not_repeated(
    halfbyte: Run,
    model_folder: Path,
    examples_file: Path,
    model: str | None,
    data: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = halfbyte("train", model or model_folder, data or examples_file, "--data.max_length=64")
    assert done.code == 2
    assert "***@127.0.0.1:9" in done.err
    assert_silent(done.out + done.err, "the error")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow  # The hub's client tries several times.
def test_login_in_the_hub_s_address_is_not_repeated(examples_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": URL, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    words = [sys.executable, "-m", "halfbyte", "train", "owner/model", str(examples_file), "--output", "out"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("halfbyte: error: model 'owner/model': ")
    assert_silent(done.stdout + done.stderr, "the error")


def test_token_in_another_tool_s_file_is_not_repeated(halfbyte: Run, tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(json.dumps({"model_name_or_path": "x/y", "stage": "sft", "hf_hub_token": SECRETS["HF_TOKEN"]}))
    done = halfbyte("import-config", path)
    assert "hf_hub_token" in done.err
    assert_silent(done.out + done.err, "the translation")


def test_hide_logins_takes_logins_and_nothing_else() -> None:
    hidden = {
        "see https://a:b@host/x and http://token@host": "see https://***@host/x and http://***@host",
        "https://a:p@ss@host:80/a@b": "https://***@host:80/a@b",
        "https:/a:b@host": "https:/***@host",
    }
    same = ["https://host/a@b", "C:/Users/x@y/z", "mail a@b.c", "owner/name@main", "git@host:owner/name"]
    assert {text: hide_logins(text) for text in hidden} == hidden
    assert [hide_logins(text) for text in same] == same
    assert str(ConfigError(f"{URL}/x: no such file")) == "https://***@127.0.0.1:9/x: no such file"
