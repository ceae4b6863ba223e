from __future__ import annotations

from pathlib import Path

from tests.interpreted import assert_passes_interpreted


def test_the_gathering_kernel_passes_under_the_interpreter() -> None:
    assert_passes_interpreted(Path(__file__).with_name("interpreted_gather.py"), num_tests=6)
