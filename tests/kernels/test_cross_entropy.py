"""Runs the interpreted tests of the loss's kernel; on a GPU it is tested by tests/ops."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import assert_passes_interpreted


def test_cross_entropy_kernel_is_right_under_the_interpreter() -> None:
    assert_passes_interpreted(Path(__file__).with_name("interpreted_cross_entropy.py"), num_tests=66)
