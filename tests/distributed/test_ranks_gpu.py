"""Ranks on GPUs: two that share one, over gloo, and two with one each, over NCCL, compute what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.torchrun import REPOSITORY, torchrun

PROGRAM = REPOSITORY / "tests" / "distributed" / "train_gpu.py"


def run(ranks: int, out: Path, *flags: str) -> dict[str, Any]:
    done = torchrun(ranks, [PROGRAM, out, *flags])
    assert done.code == 0, done.output
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


def losses_of(logged: list[tuple[int, float]]) -> list[float]:
    return [value for _, value in logged]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, and how far its losses go apart from adapters that are off by an fp32 rounding."""
    return run(1, tmp_path_factory.mktemp("alone") / "out.pt", "--nudged")


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--streamed",), ("--sharded",)], ids=["resident", "streamed", "sharded"])
@pytest.mark.parametrize("own", [False, True], ids=["shared card", "own cards"])
def test_ranks_on_gpus_train_as_one(
    own: bool, flags: tuple[str, ...], alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if not own:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    together = run(2, tmp_path / "together.pt", *flags)
    assert together["backend"] == ("nccl" if own else "gloo")
    assert len(set(together["devices"])) == (2 if own else 1)
    assert together["pieces"] > 4
    assert any("as one graph" in note for note in together["notes"])
    expected, ours = losses_of(alone["loss"]), losses_of(together["loss"])
    assert len(ours) == len(expected) >= 8
    # The first loss is of the same adapters. Later ones differ as sums in another order do: products in bf16 see an
    # adapter rounded the other way here and there, and no formula says what becomes of that. Training says it, three
    # times; of such differences, another is hardly three times the largest.
    assert ours[0] == pytest.approx(expected[0], rel=torch.finfo(torch.float32).eps * 4)
    apart = [abs(a - b) for nudged in alone["nudged"] for a, b in zip(losses_of(nudged), expected, strict=True)]
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 3 * max(apart)
