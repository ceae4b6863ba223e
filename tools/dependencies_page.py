"""Write docs/dependencies.md: what halfbyte depends on, why, within which bounds and under which licence.

    python -m tools.dependencies_page

Bounds come from the installed halfbyte's pyproject.toml, licences from the metadata of the packages installed here.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "dependencies.md"
WHY = {
    "torch": "tensors, autograd, the CPU's kernels",
    "transformers": "models, tokenizers, the training loop",
    "accelerate": "transformers' Trainer needs it",
    "safetensors": "adapters and weights are read and written",
    "numpy": "examples and batches on the host",
    "pyyaml": "run.yaml",
    "psutil": "cores and host memory",
    "rich": "progress on the terminal",
    "tensorboard": "curves of a run",
    "gguf": "GGUF models are read and written",
    "pyarrow": "Parquet files",
    "datasets": "data sets on the hub",
}
EXTRAS = ("gguf", "parquet", "hub")
# As packages write them, where they write no SPDX expression.
SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
}
# Marked so: NVIDIA's libraries and triton, which a torch with CUDA brings, follow the machine.
FOLLOWS_MACHINE = ("nvidia", "cuda", "triton", "setuptools")


def direct() -> list[tuple[str, Requirement]]:
    """Return every dependency of a user with the extra that asks for it, or an empty name."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [("", Requirement(text)) for text in project["dependencies"]]
    return found + [(extra, Requirement(text)) for extra in EXTRAS for text in project["optional-dependencies"][extra]]


def licence(name: str) -> str:
    """Return a package's licence as an SPDX expression, as far as its metadata tells."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    written = metadata.get("License-Expression") or (metadata.get("License") or "").split("\n")[0] or classifiers[0]
    return SPDX.get(written, written)


def closure() -> dict[str, str]:
    """Return the licence of every package that comes along, by name."""
    return {name: licence(name) for name in sorted(set(_walk([need for _, need in direct()], set())))}


def _walk(needs: list[Requirement], seen: set[str]) -> Iterator[str]:
    for need in needs:
        name = re.sub(r"[-_.]+", "-", need.name.lower())
        is_needed = need.marker is None or need.marker.evaluate({"extra": ""})
        if name in seen or not is_needed or name.startswith(FOLLOWS_MACHINE):
            continue
        seen.add(name)
        yield name
        yield from _walk([Requirement(text) for text in importlib.metadata.requires(name) or []], seen)


def render_page() -> str:
    """Return the page."""
    rows = [
        f"| `{need.name}` | {need.specifier} | {f'`[{extra}]`' if extra else 'always'} | {WHY[need.name]} | "
        f"{licence(need.name)} |\n"
        for extra, need in direct()
    ]
    names = {need.name for _, need in direct()}
    others = [f"{name} ({found})" for name, found in closure().items() if name not in names]
    return (
        "# Dependencies\n\nMade by `python -m tools.dependencies_page`; do not edit it by hand. `constraints.txt` pins "
        "what is tested, all but torch\nand triton, which follow the machine.\n\n"
        "| package | bounds | comes | what for | licence |\n|---|---|---|---|---|\n"
        + "".join(rows)
        + "\nThese bring along, with the licences that they state:\n\n"
        + ",\n".join(others)
        + ".\n\nA torch with CUDA brings triton (MIT) and NVIDIA's libraries (NVIDIA's own licence) besides. None of "
        "these is needed to\nimport halfbyte or to train on a CPU.\n"
        "\n`make wheel` tries the wheel in fresh environments. Tried in November 2026, without triton and extras, on\n"
        "a CPU: Python 3.11 with torch 2.13.0 and Python 3.13 with torch 2.6.0, the lowest release allowed: all\n"
        "modules import, and a step trains. With Python 3.12 no torch without CUDA was at hand: all files compile,\n"
        "the command starts, its dependencies install. Steps on GPUs were all trained with it: 3.12.3, torch 2.11 and\n"
        "transformers 5.17 made the figures of benchmarks/results/train_h100_202611.json and the tests of GPUs pass.\n"
        "On CPUs the tests pass with transformers 5.23.0 and 5.24.0, those of models and of training with 5.17.0, the\n"
        "lowest allowed.\n"
        "\nnumpy 2.0.0, PyYAML 6.0, psutil 5.9.4 and tensorboard 2.17.1, the lowest allowed, were tried together with\n"
        "Python 3.11, torch 2.13.0, transformers 5.23.0 and pandas 2.3.3: the tests of configuration, data, memory,\n"
        "TensorBoard and the main commands pass. Lower ones do not hold. numpy 1.26.0 goes with pyarrow 21, but\n"
        "pyarrow 26 needs NumPy 2 without saying so, and transformers' Trainer cannot be imported then. tensorboard\n"
        "2.16.2 and 2.17.0 cannot read the curves of a run beside NumPy 2, 2.16.0 and 2.16.1 ask for Keras. psutil\n"
        "has no wheel for Python 3.11 on Linux before 5.9.4.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
