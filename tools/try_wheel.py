"""Build the wheel, and try it in a fresh environment of each Python that is named.

    python -m tools.try_wheel [PYTHON ...]          or  make wheel PYTHONS='python3.11 python3.12 python3.13'

Each environment gets the wheel, its dependencies as constraints.txt pins them, and a torch without CUDA, and neither
triton nor an extra. Then `tools/probe_install.py` imports every module, runs the command, plans a model and trains a
step. Where the package index has only builds of torch with CUDA for a Python, gigabytes of them, all but torch and what
needs it is tried, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# The release that the Makefile takes where there is no GPU.
TORCH = "torch==2.13.0"
# What installing would bring torch along.
NEEDS_TORCH = ("torch", "accelerate")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=[sys.executable])
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, REPOSITORY]
        subprocess.run(build, check=True)
        (wheel,) = folder.glob("halfbyte-*.whl")
        for number, python in enumerate(parser.parse_args(words).pythons):
            print(f"--- {python}", flush=True)
            if not try_python(python, wheel, folder / f"environment-{number}"):
                failed.append(python)
    print(f"failed: {', '.join(failed)}" if failed else "all work")
    return 1 if failed else 0


def try_python(python: str, wheel: Path, environment: Path) -> bool:
    """Try a wheel in a new environment, and return whether all of it works."""
    subprocess.run([python, "-m", "venv", environment], check=True)
    own = str(environment / "bin" / "python")
    pip = [own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = ["--constraint", str(REPOSITORY / "constraints.txt")]
    if is_without_cuda(pip):
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, *constraints, str(wheel)], check=True)
    else:
        print(f"for this Python the index has {TORCH} with CUDA only: trying all but torch")
        subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
        subprocess.run([*pip, *constraints, *others(own)], check=True)
    # Nothing of this process's environment but where programs are.
    variables = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    probe = [own, "-I", str(REPOSITORY / "tools" / "probe_install.py")]
    return subprocess.run(probe, env=variables, cwd=environment, check=False).returncode == 0


def is_without_cuda(pip: list[str]) -> bool:
    """Say whether what pip would install as torch needs no package of CUDA; nothing is downloaded for it."""
    asked = [*pip, "--dry-run", "--no-deps", "--report", "-", TORCH]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        return False
    (torch,) = json.loads(done.stdout)["install"]
    needs = torch["metadata"].get("requires_dist", [])
    return not any(need.startswith(("nvidia", "cuda")) for need in needs)


def others(python: str) -> list[str]:
    """Return the dependencies of the halfbyte that an environment holds, without those that bring torch."""
    code = "import importlib.metadata as m, json; print(json.dumps(m.requires('halfbyte')))"
    found = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return [need for need in json.loads(found.stdout) if "extra ==" not in need and not need.startswith(NEEDS_TORCH)]


if __name__ == "__main__":
    sys.exit(main())
