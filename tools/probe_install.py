"""Try an installed halfbyte from inside its environment: every module imports, the command works, a step trains.

    PYTHON -I tools/probe_install.py [--without NAME ...]

Nothing but the standard library is needed. `-I` keeps the repository, and what stands in PYTHONPATH, out of the trial.
A package named with --without counts as not installed while modules are imported; those that then cannot be are told.
Without torch only what needs none is tried.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="packages to do as if absent")
    missing = parser.parse_args().without
    for name in missing:
        sys.modules[name] = None  # type: ignore[assignment]
    has_torch = "torch" not in missing and importlib.util.find_spec("torch") is not None
    print(f"{compile_all()} files compile without a warning")
    imported, lacking = import_all()
    print(f"{imported} modules import, {len(lacking)} lack a package: {', '.join(sorted(set(lacking))) or 'none'}")
    if has_torch and lacking:
        return 1
    run("--version")
    run("--help")
    if not has_torch:
        print("no torch here: no plan, no training step")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        run("plan", folder, "--gpus", "1x24GiB")
    run("doctor")
    return 0


def compile_all() -> int:
    """Compile every file, also of modules that cannot be imported here; return how many."""
    import halfbyte

    paths = [path for place in halfbyte.__path__ for path in Path(place).rglob("*.py")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            compile(path.read_text(encoding="utf-8"), str(path), "exec")
    return len(paths)


def import_all() -> tuple[int, list[str]]:
    """Import every module of halfbyte; return how many did, and the packages that the others lack."""
    import halfbyte

    imported, lacking = 1, []
    for module in pkgutil.walk_packages(halfbyte.__path__, "halfbyte.", onerror=lambda name: None):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
            imported += 1
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("halfbyte"):
                raise
            lacking.append(error.name.split(".")[0])
    return imported, lacking


def run(*words: str) -> None:
    """Run a command of the environment's halfbyte and show the end of what it says."""
    done = subprocess.run(
        [sys.executable, "-I", "-m", "halfbyte", *words], capture_output=True, text=True, check=False, timeout=300
    )
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    print(f"halfbyte {words[0]}: exit code {done.returncode}, {last}")
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
