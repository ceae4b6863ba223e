"""A tiny model and examples for runs that will be harmed, and what the run comes to that nothing happens to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import write_examples
from tests.faults.processes import Outcome, Training
from tests.train.tiny import build_tiny, build_tokenizer

OPTIONS = (
    "--train.num_train_epochs=3",
    "--train.learning_rate=0.01",
    "--train.per_device_train_batch_size=1",
    "--train.gradient_accumulation_steps=2",
    "--train.logging_steps=1",
    "--train.neftune_noise_alpha=5",
    "--train.num_samples=0",
    "--lora.dropout=0.1",
    "--lora.rank=4",
    "--data.max_length=64",
    "--data.held_out_fraction=0.1",
    "--model.device=cpu",
)
Make = Callable[..., Training]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_examples(folder / "tickets.jsonl", range(40))
    return folder


@pytest.fixture(scope="session")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("reference") / "out"
    Training(source / "model", source / "tickets.jsonl", folder, (*OPTIONS, "--train.save_steps=1")).finish()
    return Outcome.of(folder)


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Make:
    """Make a run that the reference shows the end of."""

    def build(*options: str, save_steps: int | None = 1, folder: str = "out", data: Path | None = None) -> Training:
        words = (*OPTIONS, f"--train.save_steps={save_steps or 'none'}", *options)
        return Training(source / "model", data or source / "tickets.jsonl", tmp_path / folder, words)

    return build
