"""Runs the interpreted tests of quantise and dequantise; on a GPU the kernels are tested by tests/ops."""

from __future__ import annotations

from pathlib import Path

from tests.interpreted import assert_passes_interpreted


def test_4bit_kernels_are_right_under_the_interpreter() -> None:
    assert_passes_interpreted(Path(__file__).with_name("interpreted_4bit.py"), num_tests=78)
