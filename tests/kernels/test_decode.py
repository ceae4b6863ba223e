"""Runs the interpreted tests of the kernels that decode one token; on a GPU they are tested by tests/ops."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import assert_passes_interpreted


def test_decode_kernels_are_right_under_the_interpreter() -> None:
    assert_passes_interpreted(Path(__file__).with_name("interpreted_decode.py"), num_tests=103)
