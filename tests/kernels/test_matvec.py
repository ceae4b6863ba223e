"""Runs the interpreted tests of matvec_4bit; on a GPU the kernel is tested by tests/ops."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import assert_passes_interpreted


def test_matvec_4bit_kernel_is_right_under_the_interpreter() -> None:
    assert_passes_interpreted(Path(__file__).with_name("interpreted_matvec.py"), num_tests=48)
