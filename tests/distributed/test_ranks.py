"""Several ranks compute what one does: real processes, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.distributed import ALONE
from tests.distributed.torchrun import REPOSITORY, torchrun
from tests.distributed.train_tiny import SCENARIOS, run_scenario

PROGRAM = REPOSITORY / "tests" / "distributed" / "train_tiny.py"
# A gradient is a sum over turns; another order of n terms rounds differently by n eps at most, and Adam passes on the
# relative error of a gradient. Ten steps of it, each starting from the last.
RELATIVE = 10 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("ranks", "names"), [(2, tuple(SCENARIOS)), (4, ("uneven", "packed", "streamed", "sharded"))])
def test_several_ranks_train_as_one_with_more_accumulation(tmp_path: Path, ranks: int, names: tuple[str, ...]) -> None:
    done = torchrun(ranks, [PROGRAM, tmp_path / "out.pt", *names])
    assert done.code == 0, done.output
    together = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in names:
        alone, shared = run_scenario(name, tmp_path / name.replace(" ", "-")), together[name]
        for figure in ("loss", "grad_norm"):
            assert [step for step, _ in shared[figure]] == [step for step, _ in alone[figure]], name
            theirs, ours = ([value for _, value in one[figure]] for one in (shared, alone))
            assert theirs == pytest.approx(ours, rel=RELATIVE), (name, figure)
        if name == "streamed":
            # One memory a block, the same for all.
            assert [len(inodes) for inodes in shared["shared"]] == [2] * ranks
            assert len({tuple(inodes) for inodes in shared["shared"]}) == 1
        if name == "sharded":
            # Each of two blocks, of seven layers each, visits all ranks but the one it lives on.
            assert shared["visiting"] == [7 * (2 - (rank < 2)) for rank in range(ranks)]
            assert [len(inodes) for inodes in shared["shared"]] == [2] * ranks
        assert shared["held_out"] == pytest.approx(alone["held_out"], rel=RELATIVE), name
        for path, value in alone["values"].items():
            difference = (shared["values"][path] - value).norm() / value.norm().clamp(min=1e-12)
            assert difference < RELATIVE, (name, path)


def test_a_process_alone_meets_nobody() -> None:
    tensor = torch.ones(3)
    ALONE.add_([tensor])
    ALONE.copy_from_main_([tensor])
    ALONE.agree({"anything": 1})
    assert ALONE.sum(1, 2.5) == (1, 2.5)
    assert ALONE.gather({"a": None}) == [{"a": None}]
    assert tensor.tolist() == [1, 1, 1]
    assert ALONE.is_main
