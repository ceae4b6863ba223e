from __future__ import annotations

import torch

from halfbyte.ops import Workspace

CPU = torch.device("cpu")


def test_workspace_reuses_the_memory_of_a_key() -> None:
    workspace = Workspace()
    first = workspace.take("weight", (8, 16), dtype=torch.float32, device=CPU)
    smaller = workspace.take("weight", (3, 5), dtype=torch.bfloat16, device=CPU)
    assert first.data_ptr() == smaller.data_ptr()
    assert first.shape == (8, 16)
    assert smaller.shape == (3, 5)
    assert smaller.dtype == torch.bfloat16
    assert smaller.is_contiguous()


def test_workspace_grows_and_keeps_the_largest() -> None:
    workspace = Workspace()
    workspace.take("weight", (10,), dtype=torch.float32, device=CPU)
    workspace.take("weight", (100,), dtype=torch.float32, device=CPU)
    workspace.take("weight", (10,), dtype=torch.float32, device=CPU)
    assert workspace.nbytes == 400


def test_workspace_keeps_keys_apart() -> None:
    workspace = Workspace()
    left = workspace.take("left", (4,), dtype=torch.float32, device=CPU)
    right = workspace.take("right", (4,), dtype=torch.float32, device=CPU)
    left.fill_(1)
    right.fill_(2)
    assert left.tolist() == [1] * 4


def test_workspace_releases() -> None:
    workspace = Workspace()
    workspace.take("weight", (10,), dtype=torch.float32, device=CPU)
    workspace.release()
    assert workspace.nbytes == 0


def test_generation_rises_when_a_buffer_moves_and_only_then() -> None:
    workspace = Workspace()
    workspace.take("a", (4,), dtype=torch.float32, device=CPU)
    generation = workspace.generation
    workspace.take("a", (2, 2), dtype=torch.float32, device=CPU)
    assert workspace.generation == generation
    workspace.take("a", (5,), dtype=torch.float32, device=CPU)
    assert workspace.generation > generation
    generation = workspace.generation
    workspace.release()
    assert workspace.generation > generation
