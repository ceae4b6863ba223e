"""Damaged files end in a result or in an error of ours, for every reader; `make fuzz` runs many more of them."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.outcomes import outcome_of
from tests.fuzz.targets import TARGETS, damage_file

# These translate a whole file for each example, and take a hundred times as long as the others.
SLOW = ("axolotl", "llama-factory")


@pytest.fixture(scope="module", params=list(TARGETS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def valid(name: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        TARGETS[name].files(Path(folder))
        assert outcome_of(TARGETS[name].read, Path(folder)) == "result"
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_damaged_files_end_in_a_result_or_an_error_of_ours(name: str, valid: dict[str, bytes]) -> None:
    # `seed` makes a failure on one machine one on all; an integer, not hypothesis' own Random, keeps examples cheap.
    @seed(20)
    @settings(
        max_examples=60 if name in SLOW else 300,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.integers(min_value=0, max_value=2**32))
    def check(number: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            damage_file(TARGETS[name], random.Random(number), valid, Path(folder))
            outcome_of(TARGETS[name].read, Path(folder))

    check()
