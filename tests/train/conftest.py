"""A tiny model in a folder, made once for all runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny import build_tiny, build_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_tiny("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
