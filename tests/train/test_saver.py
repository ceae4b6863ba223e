from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.models.adapter_files import AdapterContent
from halfbyte.train.checkpoint import find_checkpoint, list_checkpoints, load_tensors
from halfbyte.train.saver import CheckpointSaver
from halfbyte.train.snapshot import Snapshot, TokenizerFiles
from tests.train.full_disk import files_up_to
from tests.train.tiny import build_tokenizer

NO_TOKENIZER = TokenizerFiles(None)


class Told:
    """A saver, and what it said."""

    def __init__(self, folder: Path, tokenizer: TokenizerFiles = NO_TOKENIZER) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.saver = CheckpointSaver(folder, tokenizer=tokenizer, say=self.said.append, warn=self.warned.append)

    def save(self, step: int, *, keep: int | None = None, spared: int | None = None, **states: Any) -> None:
        snapshot = Snapshot(
            step=step,
            adapter=AdapterContent(tensors={"a": torch.full((3,), float(step))}, description="{}", metadata={}),
            states={"optimizer.pt": {"step": step}, **states},
            documents={"run_state.json": {}},
            texts={},
        )
        self.saver.save(snapshot, keep=keep, choose_spared=lambda steps: {spared} & steps)


def test_saver_writes_whole_checkpoints_and_rotates(tmp_path: Path) -> None:
    told = Told(tmp_path, TokenizerFiles(build_tokenizer()))
    for step in (1, 2, 3, 4):
        told.save(step, keep=2, spared=1)
    told.saver.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert told.said == [f"saved checkpoint-{step}" for step in (1, 2, 3, 4)]
    for path in list_checkpoints(tmp_path):
        assert {"tokenizer.json", "adapter_config.json", "adapter_model.safetensors"} <= {
            p.name for p in path.iterdir()
        }
    assert find_checkpoint(tmp_path, told.warned.append) == tmp_path / "checkpoint-4"
    assert told.warned == []


def test_saver_replaces_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.save(1, **{"old.pt": 1})
    told.save(1, **{"new.pt": 2})
    told.saver.wait()
    assert not (tmp_path / "checkpoint-1" / "old.pt").exists()
    assert load_tensors(tmp_path / "checkpoint-1" / "new.pt") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_saver_survives_a_full_disk(tmp_path: Path) -> None:
    told = Told(tmp_path)
    with files_up_to(10_000):
        told.save(1)
        told.save(2, **{"scaler.pt": torch.zeros(10_000)})
        told.saver.wait()
    assert told.saver.failed_step == 2
    assert told.said == ["saved checkpoint-1"]
    assert "checkpoint-2: it could not be written: File too large" in told.warned[0]
    assert "checkpoint-1 is kept; training goes on" in told.warned[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    told.save(3)
    told.saver.wait()
    assert told.saver.failed_step is None
    assert find_checkpoint(tmp_path, told.warned.append) == tmp_path / "checkpoint-3"


def test_saver_makes_a_vanished_folder_anew(tmp_path: Path) -> None:
    told = Told(tmp_path / "out")
    told.save(1)
    told.saver.wait()
    shutil.rmtree(tmp_path / "out")
    told.save(2)
    told.saver.wait()
    assert find_checkpoint(tmp_path / "out", told.warned.append) == tmp_path / "out" / "checkpoint-2"


def test_saver_reports_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    told = Told(tmp_path / "out")
    # Also for root, whom permissions do not hold up.
    (tmp_path / "out").write_text("a file where the folder was")
    told.save(1)
    told.saver.wait()
    assert "File exists" in told.warned[0]
    assert "There is none before it; training goes on" in told.warned[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the test above puts a file there")
def test_saver_reports_a_read_only_folder(tmp_path: Path) -> None:
    told = Told(tmp_path)
    tmp_path.chmod(0o500)
    told.save(1)
    told.saver.wait()
    tmp_path.chmod(0o700)
    assert "Permission denied" in told.warned[0]


def test_saver_raises_what_is_not_the_disk(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.save(1, **{"optimizer.pt": threading.Lock()})
    with pytest.raises(TypeError, match="pickle"):
        told.saver.wait()
    assert list(tmp_path.iterdir()) == []
    told.save(2)
    told.saver.wait()
    assert told.said == ["saved checkpoint-2"]
