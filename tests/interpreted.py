"""Runs tests of Triton kernels under Triton's interpreter, which has to be asked for before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def assert_passes_interpreted(file: Path, *, num_tests: int) -> None:
    """Run a file of tests in a process of its own, and fail unless all of so many pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert f"\n{num_tests} passed in" in output, output
