"""Blocks divided among the ranks of a host, from loading to the last step, by the command a person gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.cli.main import main
from tests.distributed.test_misfortunes import assert_equal_adapters, words_of_a_run
from tests.distributed.torchrun import torchrun

SHARDED = ("--memory.streamed_blocks=2", "--memory.sharded=true")


def test_a_run_with_a_divided_base_is_the_one_with_a_whole_base(tmp_path: Path) -> None:
    words = [*words_of_a_run(tmp_path), "--train.max_steps=4", "--train.gradient_accumulation_steps=2"]
    divided = torchrun(2, [*words, *SHARDED, "--output", tmp_path / "divided"])
    assert divided.code == 0, divided.output
    assert "2 of 2 blocks visit from the cards of this host" in divided.output
    assert "divided among the cards of this host: weights of 2 decoder blocks" in divided.output
    whole = torchrun(2, [*words, "--output", tmp_path / "whole"])
    assert whole.code == 0, whole.output
    assert_equal_adapters(tmp_path / "divided", tmp_path / "whole")
    summaries = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("divided", "whole"))
    assert len({summary["steps"] for summary in summaries}) == 1


@pytest.mark.parametrize("unplanned", [(), ("--lora.modules_to_save=norm",)], ids=["planned", "unplanned"])
def test_one_rank_has_nobody_to_share_with(
    unplanned: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(word) for word in words_of_a_run(tmp_path)[2:]]
    assert main([*words, *SHARDED, *unplanned, "--output", str(tmp_path / "out")]) == 2
    assert "memory.sharded: there is one rank on this host" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
