"""Runs the interpreted tests of the fused block's elementwise kernels; on a GPU they are tested by tests/ops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_fused_kernels_are_right_under_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_fused.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "173 passed" in done.stdout
