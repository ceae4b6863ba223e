"""Several adapters on one base, by the commands that answer."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.cli.main import main
from tests.cli.conftest import Outcome
from tests.cli.test_train import TRAINING

Run = Callable[..., Outcome]
SHORT = ("--max-new-tokens=4",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, examples_file: Path) -> dict[str, Path]:
    """Return two runs on one base; the second has tokens of its own."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"first": (), "second": ("--lora.alpha=8", "--train.seed=3", "--model.added_tokens=<|a|>,<|b|>")}
    for name, more in options.items():
        words = ("train", model_folder, examples_file, "--output", folder / name, *TRAINING, *more)
        assert main([str(word) for word in words]) == 0
    return {name: folder / name for name in options}


def test_generate_gives_the_answer_of_each(halfbyte: Run, runs: dict[str, Path], model_folder: Path) -> None:
    prompt = ("Item 1? <|a|>", "--json", *SHORT)
    alone = {name: json.loads(halfbyte("generate", folder, *prompt).out)["answer"] for name, folder in runs.items()}
    both = halfbyte("generate", runs["first"], "--adapter", runs["second"], *prompt)
    rows = [json.loads(line) for line in both.out.splitlines()]
    assert {row["adapter"]: row["answer"] for row in rows} == alone
    on_model = halfbyte(
        "generate", model_folder, "--adapter", f"b={runs['second']}", "--adapter", f"a={runs['first']}", *prompt
    )
    rows = [json.loads(line) for line in on_model.out.splitlines()]
    assert [(row["adapter"], row["answer"]) for row in rows] == [("b", alone["second"]), ("a", alone["first"])]
    readable = halfbyte("generate", runs["first"], "--adapter", runs["second"], prompt[0], *SHORT)
    assert f"first: {alone['first']}" in readable.out
    assert f"second: {alone['second']}" in readable.out


def test_chat_switches(halfbyte: Run, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Item 1?\n/adapter second\n/reset\nItem 1?\n/adapter other\n/adapter\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    done = halfbyte("chat", runs["first"], "--adapter", runs["second"], *SHORT)
    assert done.code == 0
    assert "/adapter NAME lets another adapter answer (first, second)" in done.out
    assert "second answers; there are first, second" in done.out
    assert "there is no adapter named 'other'; there are first, second" in done.out
    answers = [line.partition("model: ")[2] for line in done.out.splitlines() if "model: " in line]
    alone = []
    for folder in runs.values():
        monkeypatch.setattr(sys, "stdin", io.StringIO("Item 1?\n"))
        lines = halfbyte("chat", folder, *SHORT).out.splitlines()
        alone += [line.partition("model: ")[2] for line in lines if "model: " in line]
    assert answers == alone


def test_adapters_that_cannot_be_are_refused(
    halfbyte: Run, runs: dict[str, Path], model_folder: Path, tmp_path: Path
) -> None:
    for words, message in (
        ((runs["first"], "--adapter", runs["first"]), "two are named 'first'"),
        ((runs["first"], "--adapter", model_folder), "there is no adapter"),
    ):
        done = halfbyte("generate", *words, "Item?", *SHORT)
        assert done.code != 0
        assert message in done.err
    config = json.loads((runs["second"] / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another/model"
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(config))
    (other / "adapter_model.safetensors").write_bytes((runs["second"] / "adapter_model.safetensors").read_bytes())
    done = halfbyte("generate", runs["first"], "--adapter", other, "Item?", *SHORT)
    assert "was trained on another/model, and not on" in done.err
