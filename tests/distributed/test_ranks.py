"""Several ranks compute what one does: real processes, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.distributed import ALONE
from tests.distributed.torchrun import REPOSITORY, torchrun, torchrun_hosts
from tests.distributed.train_tiny import SCENARIOS, run_scenario

PROGRAM = REPOSITORY / "tests" / "distributed" / "train_tiny.py"
# A gradient is a sum over turns; another order of n terms rounds differently by n eps at most, and Adam passes on the
# relative error of a gradient. Ten steps of it, each starting from the last.
RELATIVE = 10 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, tuple(SCENARIOS)), (4, ("uneven", "packed", "streamed", "sharded", "begun anew"))]
)
def test_several_ranks_train_as_one_with_more_accumulation(tmp_path: Path, ranks: int, names: tuple[str, ...]) -> None:
    done = torchrun(ranks, [PROGRAM, tmp_path / "out.pt", *names])
    assert done.code == 0, done.output
    together = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in names:
        assert_as_one_rank(together[name], name, tmp_path)
    if "in pieces" in names:
        # The largest batch is tried first; then one of two micro-batches is the last of a step.
        assert together["in pieces"]["sent"] == [0, *[0, 14] * 8]
    assert sum("out of memory on cpu" in note for note in together["begun anew"]["notes"]) == 1
    assert together["begun anew"]["sent"][5] == 14
    if "streamed" in names:
        # One memory a block, the same for all.
        mapped = together["streamed"]["shared"]
        assert [len(inodes) for inodes in mapped] == [2] * ranks
        assert len({tuple(inodes) for inodes in mapped}) == 1
    if "sharded" in names:
        # Each of two blocks, of seven layers each, visits all ranks but the one it lives on.
        assert together["sharded"]["visiting"] == [7 * (2 - (rank < 2)) for rank in range(ranks)]
        assert [len(inodes) for inodes in together["sharded"]["shared"]] == [2] * ranks


def test_two_hosts_train_as_one_rank_and_each_has_its_own_copy_of_what_visits(tmp_path: Path) -> None:
    names = ("uneven", "streamed", "sharded")
    for done in torchrun_hosts(2, 2, [PROGRAM, tmp_path / "out.pt", *names]):
        assert done.code == 0, done.output
    together = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in names:
        assert_as_one_rank(together[name], name, tmp_path)
    for name in ("streamed", "sharded"):
        one, two, three, four = (set(inodes) for inodes in together[name]["shared"])
        assert one == two
        assert three == four
        assert not one & three
    assert together["sharded"]["visiting"] == [7] * 4


def assert_as_one_rank(shared: dict[str, Any], name: str, folder: Path) -> None:
    """Fail unless ranks have come to what one rank comes to in a scenario, but for sums in another order."""
    alone = run_scenario(name, folder / name.replace(" ", "-"))
    for figure in ("loss", "grad_norm"):
        assert [step for step, _ in shared[figure]] == [step for step, _ in alone[figure]], name
        theirs, ours = ([value for _, value in one[figure]] for one in (shared, alone))
        assert theirs == pytest.approx(ours, rel=RELATIVE), (name, figure)
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
