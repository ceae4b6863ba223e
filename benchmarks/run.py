"""Time the operations of halfbyte, beside its peers where they have the same one, and write the rows as JSON.

    python -m benchmarks.run                              everything that this machine can run
    python -m benchmarks.run --only dequantize_4bit,load  some of it
    python -m benchmarks.run --device cpu --output x.json

A number comes with its gate: the tests of what is timed run first, and a red test refuses the timing. `--no-gate`
leaves them out and says so in the result. Each `bench_<stem>.py` here has a function `rows(device)` that yields one
flat dict a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
GATES = {
    "quantize_4bit": ["tests/ops/test_quantize_4bit.py"],
    "dequantize_4bit": ["tests/ops/test_dequantize_4bit.py"],
    "matvec_4bit": ["tests/ops/test_matvec_4bit.py"],
    "lora_linear": ["tests/ops/test_lora_linear.py", "tests/ops/test_linear_4bit.py"],
    "cross_entropy": ["tests/ops/test_cross_entropy.py"],
    "adamw8bit": ["tests/ops/test_adamw8bit.py"],
    "fused_ops": [f"tests/ops/test_{stem}.py" for stem in ("rms_norm", "rotary", "swiglu", "counter_dropout")],
    "fp8_products": [
        *(f"tests/ops/test_{stem}_fp8.py" for stem in ("quantize_rows", "adapter_columns", "dequantize")),
        "tests/ops/test_product_fp8.py",
        "tests/nn/test_fp8_weights.py",
    ],
    "decode_ops": [f"tests/ops/test_decode_{stem}.py" for stem in ("attention", "inner")],
    "load": ["tests/models"],
    "train": ["tests/train"],
    "save": ["tests/train/test_saver.py", "tests/train/test_resume.py"],
    "generate": ["tests/models/test_generate.py", "tests/models/test_static_decoder.py"],
}
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "accelerate", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stems = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser.add_argument("--only", default=",".join(stems), help=f"comma-separated; of {', '.join(stems)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<stem>_<machine>_<yyyymm>.json")
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    options = parser.parse_args()
    device = torch.device(options.device)
    failed = False
    for stem in options.only.split(","):
        if stem not in stems:
            parser.error(f"no benchmark named {stem!r}; there are {', '.join(stems)}")
        if not options.no_gate and not gate_is_green(stem, device):
            print(f"{stem}: tests are red, not timed", file=sys.stderr)
            failed = True
            continue
        result = {**describe(device), "bench": stem, "gate": "not run" if options.no_gate else "green", "rows": []}
        for row in measured_rows(stem, device):
            result["rows"].append(row)
            print(json.dumps({"bench": stem, **row}), flush=True)
        write(result, options.output or default_output(stem, device))
    return int(failed)


def gate_is_green(stem: str, device: torch.device) -> bool:
    marker = "gpu" if device.type == "cuda" else "not gpu and not slow"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marker, *GATES.get(stem, [])]
    code = subprocess.run(command, cwd=FOLDER.parent, check=False).returncode
    no_tests_collected = 5
    return code in (0, no_tests_collected) if device.type == "cuda" else code == 0


def measured_rows(stem: str, device: torch.device) -> Iterator[dict[str, object]]:
    module = importlib.import_module(f"benchmarks.bench_{stem}")
    yield from module.rows(device)


def describe(device: torch.device) -> dict[str, object]:
    """The machine, the versions and the moment, so that a number can be placed later."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "machine": machine_name(device),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "time": time.strftime("%H:%M:%S"),
    }


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    bf16 = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({', '.join(bf16)})"


def default_output(stem: str, device: torch.device) -> Path:
    name = machine_name(device).lower()
    short = "h100" if "h100" in name else "h200" if "h200" in name else "cpu" if device.type == "cpu" else "gpu"
    return FOLDER / "results" / f"{stem}_{short}_{datetime.date.today():%Y%m}.json"


def write(result: dict[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
