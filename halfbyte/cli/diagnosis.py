"""What the doctor finds out about a machine without training: hardware, versions, and what follows from them."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte import __version__
from halfbyte.device import (
    cpu_features,
    cpu_has_fast_bf16,
    default_compute_dtype,
    describe_machine,
    free_bytes,
    installed_version,
)

if TYPE_CHECKING:
    import torch

GIB = 2**30
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "triton")
# Distribution, what it is for, and the name by which halfbyte asks for it.
OPTIONAL = (
    ("gguf", "GGUF models", "gguf"),
    ("pyarrow", "Parquet files", "parquet"),
    ("datasets", "data sets on the hub", "hub"),
)
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Something that works here, or does not."""

    name: str
    works: bool
    text: str
    """How; or why not, and how to get it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All that was found out."""

    machine: dict[str, str]
    versions: dict[str, str]
    abilities: tuple[Ability, ...]


def examine() -> Diagnosis:
    """Find out what there is and what works."""
    return Diagnosis(
        machine=describe_hardware(),
        versions=describe_versions(),
        abilities=tuple(_gpu_abilities()) + tuple(_cpu_abilities()) + tuple(_optional_abilities()),
    )


def describe_hardware() -> dict[str, str]:
    """Return processor, memory, disk and GPUs, each in words."""
    import torch

    machine = describe_machine()
    features = [name for name in CPU_FEATURES if name in cpu_features()]
    total = f"{machine.host_bytes / GIB:.1f} GiB, of them " if machine.host_bytes else ""
    memory = f"{total}{free_bytes(torch.device('cpu')) / GIB:.1f} GiB free"
    facts = {
        "system": platform.platform(terse=True),
        "processor": f"{machine.cpu}, {machine.num_cpus} CPUs",
        "CPU features": ", ".join(features) or "none that is known to matter",
        "memory": memory,
        "disk here": f"{shutil.disk_usage('.').free / GIB:.0f} GiB free",
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        facts[f"GPU {index}"] = _describe_gpu(torch.device("cuda", index))
    return facts if count else facts | {"GPU": "none that torch sees"}


def describe_versions() -> dict[str, str]:
    """Return the version of each package that matters, or that it is not installed."""
    names = (*LIBRARIES, *(package for package, _, _ in OPTIONAL))
    versions = {name: installed_version(name) or "not installed" for name in names}
    return {"halfbyte": __version__, "Python": platform.python_version(), **versions}


def _gpu_abilities() -> Iterator[Ability]:
    import torch

    from halfbyte.ops.e4m3 import why_no_fp8

    has_gpu = torch.cuda.is_available()
    yield Ability(name="training on a GPU", works=has_gpu, text="yes" if has_gpu else _why_no_gpu(torch.version.cuda))
    if not has_gpu:
        return
    device = torch.device("cuda", 0)
    has_triton = installed_version("triton") is not None
    yield Ability(
        name="fused kernels",
        works=has_triton,
        text="by triton" if has_triton else "triton is not installed: pip install triton",
    )
    is_narrow = default_compute_dtype(device) == torch.bfloat16
    yield Ability(
        name="bf16 on the GPU",
        works=is_narrow,
        text="yes" if is_narrow else "came with compute capability 8.0 (Ampere); runs compute in float16 here",
    )
    why = why_no_fp8(device)
    yield Ability(name="fp8 on the GPU", works=why is None, text=why or "yes, with --train.fp8=true")


def _cpu_abilities() -> Iterator[Ability]:
    has_bf16 = cpu_has_fast_bf16()
    yield Ability(name="training on the CPU", works=True, text=f"in {'bfloat16' if has_bf16 else 'float32'}")
    yield Ability(
        name="bf16 on the CPU",
        works=has_bf16,
        text="yes"
        if has_bf16
        else "this processor has no bf16 instructions (AVX512-BF16, AMX or Arm's); float32 is used",
    )


def _optional_abilities() -> Iterator[Ability]:
    for package, purpose, extra in OPTIONAL:
        version = installed_version(package)
        text = f"{package} {version}" if version else f"{package} is not installed: pip install 'halfbyte[{extra}]'"
        yield Ability(name=purpose, works=version is not None, text=text)


def _why_no_gpu(built_for_cuda: str | None) -> str:
    """Return why torch sees no GPU, and what to do."""
    if not NVIDIA_DRIVER.exists() and shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver on this machine; with a card in it, install the driver first"
    if built_for_cuda is None:
        return "this torch is built without CUDA: pip install --force-reinstall torch, as https://pytorch.org says"
    return f"torch is built for CUDA {built_for_cuda}, and the driver gives it no GPU: see what nvidia-smi says"


def _describe_gpu(device: torch.device) -> str:
    import torch

    facts = torch.cuda.get_device_properties(device)
    return (
        f"{facts.name}, {free_bytes(device) / GIB:.1f} GiB of {facts.total_memory / GIB:.1f} GiB free, compute "
        f"capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
    )
