from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.train.checkpoint import load_tensors
from halfbyte.train.random_state import read_random_state, restore_random_state

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
