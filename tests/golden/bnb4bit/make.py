"""Make cases.safetensors with bitsandbytes: weights, and the tensors that it stores for them.

    python -m tests.golden.bnb4bit.make

Run once, with the versions written into the file's metadata, on a CPU without AVX-512. The file is compared by
tests/quant/test_golden.py, which needs no bitsandbytes.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

from tests.ops.quantize_cases import make_weight

FILE = Path(__file__).with_name("cases.safetensors")
CASES = [
    ("nf4", 64, True, torch.bfloat16, (40, 64)),
    ("nf4", 64, False, torch.bfloat16, (40, 64)),
    ("nf4", 64, True, torch.float16, (13, 96)),
    ("nf4", 64, True, torch.float32, (16, 80)),
    ("nf4", 32, True, torch.bfloat16, (129, 64)),
    ("nf4", 128, True, torch.bfloat16, (9, 100)),
    ("nf4", 4096, True, torch.bfloat16, (70, 64)),
    ("nf4", 64, False, torch.float32, (1, 333)),
    ("fp4", 64, True, torch.bfloat16, (40, 64)),
    ("fp4", 64, False, torch.float32, (7, 64)),
    ("fp4", 256, True, torch.float16, (11, 50)),
]


def main() -> None:
    tensors = {}
    for number, (codebook, block_size, double_quant, dtype, shape) in enumerate(CASES):
        weight = make_weight(shape, dtype, seed=number)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=block_size, quant_type=codebook, compress_statistics=double_quant
        )
        tensors[f"{number}.original"] = weight
        tensors[f"{number}.weight"] = packed
        tensors |= {f"{number}.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        with torch.compiler.set_stance("force_eager"):
            tensors[f"{number}.restored"] = bnb.dequantize_4bit(packed, state).view(shape)
    versions = {name: metadata.version(name) for name in ("bitsandbytes", "torch")}
    made_with = {**versions, "python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability()}
    save_file(tensors, FILE, metadata={"made_with": json.dumps(made_with)})


if __name__ == "__main__":
    main()
