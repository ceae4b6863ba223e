"""Ranks on GPUs: two that share one, over gloo, and two with one each, over NCCL, compute what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.torchrun import REPOSITORY, torchrun

PROGRAM = REPOSITORY / "tests" / "distributed" / "train_gpu.py"
# Micro-batches are computed alike; their gradients are added up in fp32 in another order, which moves a weight by less
# than Adam's step where a gradient is nearly zero. Ten steps; then products in bf16 see weights rounded to 8 bits, so
# that a loss can differ by the share of weights that round the other way.
LOSS_RELATIVE = 1e-4


def run(ranks: int, out: Path, *flags: str) -> dict[str, object]:
    done = torchrun(ranks, [PROGRAM, out, *flags])
    assert done.code == 0, done.output
    result: dict[str, object] = torch.load(out, weights_only=True)
    return result


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--streamed",)], ids=["resident", "streamed"])
@pytest.mark.parametrize("own", [False, True], ids=["shared card", "own cards"])
def test_ranks_on_gpus_train_as_one(
    own: bool, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    alone = run(1, tmp_path / "alone.pt", *flags)
    if not own:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    together = run(2, tmp_path / "together.pt", *flags)
    assert together["backend"] == ("nccl" if own else "gloo")
    assert len(set(together["devices"])) == (2 if own else 1)  # type: ignore[call-overload]
    assert any("as one graph" in note for note in together["notes"])  # type: ignore[attr-defined]
    losses = [[value for _, value in one["loss"]] for one in (alone, together)]  # type: ignore[attr-defined]
    assert len(losses[0]) >= 8
    assert losses[1] == pytest.approx(losses[0], rel=LOSS_RELATIVE)
