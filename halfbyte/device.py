"""What this machine has, and the two defaults that follow from it: the device, and the dtype products run in.

Nothing is probed at import; each function asks when it is called. torch is imported inside the functions, so that
options and help cost nothing.

Compute dtype. A CPU without bf16 instructions converts each operand and is slower in bf16 than in fp32; with them it
is about twice as fast. float16 products on a CPU run at about 1 GFLOP/s in torch, several hundred times slower than
fp32, so they are never chosen. A GPU computes in bf16 from compute capability 8.0 (Ampere) on; older ones emulate it,
and take float16.

Freed memory. glibc gives large freed buffers back to the kernel at once, and maps fresh pages for the next one: each
page is faulted in and zeroed again. Writing into fresh pages runs at about 3 GB/s, into reused ones at about 29 GB/s.
`keep_freed_memory` makes the process keep what it once had. The price: its memory does not shrink until it ends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from halfbyte.errors import BackendError

if TYPE_CHECKING:
    import torch

CPU_INFO = Path("/proc/cpuinfo")
PROCESS_STATUS = Path("/proc/self/status")
CONTROL_GROUP = Path("/sys/fs/cgroup")
# x86 names its flags avx512_bf16 and amx_bf16, Linux on ARM calls the feature bf16.
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Where torch's allocator on a GPU is set up: newer releases read the first, all of them the second.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE_SEGMENTS = "expandable_segments:True"
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class ComputeDtype(NamedTuple):
    """The dtype that products run in, and what to tell the person where it is not the one that was asked for."""

    dtype: torch.dtype
    note: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine a run happens on; str() is one line."""

    cpu: str
    num_cpus: int
    host_bytes: int | None
    """None where the system does not say."""
    gpus: tuple[str, ...]
    """Name and memory of each."""
    python: str
    torch: str

    def __str__(self) -> str:
        host = f", {self.host_bytes / 2**30:.1f} GiB" if self.host_bytes else ""
        gpus = "; ".join(self.gpus) if self.gpus else "no GPU"
        return f"{self.cpu}, {self.num_cpus} CPUs{host}; {gpus}; torch {self.torch}, Python {self.python}"


def default_device() -> torch.device:
    """Return the first CUDA GPU, or else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`; `auto` is the default one.

    Raises:
        BackendError: where there is no such device on this machine.
    """
    import torch

    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"model.device is {name!r}; allowed: auto, cpu, cuda, cuda:0, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"model.device is {str(name)!r}; supported are auto, cpu and cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise BackendError(
                f"model.device is {str(name)!r}, but torch sees {count} CUDA GPUs; use --model.device=auto"
            )
        return torch.device("cuda", device.index or 0)
    return device


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which products are fastest on `device` without losing the range of fp32 where avoidable."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32


def resolve_compute_dtype(name: str | torch.dtype, device: torch.device) -> ComputeDtype:
    """Return the dtype called `name` for products on `device`; `auto` is the default one.

    float16 on a CPU is replaced, and bfloat16 on a device that only emulates it is kept; the note says so.
    """
    import torch

    default = default_compute_dtype(device)
    if name == "auto":
        return ComputeDtype(default, None)
    dtype = getattr(torch, name) if isinstance(name, str) else name
    if dtype == torch.float16 and device.type == "cpu":
        return ComputeDtype(default, f"float16 products are unusably slow on a CPU: computing in {_short(default)}")
    if dtype == torch.bfloat16 and default != torch.bfloat16:
        return ComputeDtype(dtype, f"this device has no bf16 instructions: {_short(default)} would be faster")
    return ComputeDtype(dtype, None)


def cpu_has_fast_bf16() -> bool:
    """Say whether this CPU multiplies bf16 natively. Where the system lists no CPU features, the answer is no."""
    return not BF16_FLAGS.isdisjoint(cpu_features())


def cpu_features() -> frozenset[str]:
    """Return the CPU's features by their names in /proc/cpuinfo; empty where the system lists none."""
    return frozenset(_cpu_info_line("flags", "Features").split())


def describe_machine() -> Machine:
    """Ask for processor, memory, GPUs and versions."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        gpus.append(f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB")
    return Machine(
        cpu=_cpu_info_line("model name") or platform.processor() or platform.machine(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        host_bytes=_host_bytes(),
        gpus=tuple(gpus),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None where it is not installed. Nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory instead of giving it back to the kernel.

    Returns:
        Whether it took effect: only glibc has the setting, elsewhere nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    # No buffer of its own mapping, which free() would unmap; and a heap whose top is never trimmed (-1 is SIZE_MAX).
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now.

    On Linux only anonymous memory counts: pages of mapped files are the kernel's to drop. Elsewhere it is all of it.
    """
    anonymous = _process_status("RssAnon")
    if anonymous is not None:
        return anonymous
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Return the most memory that this process ever held, mapped files included."""
    peak = _process_status("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    # Bytes on macOS, KiB on other systems.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a process can still take on the device."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if (share := getattr(torch.cuda, "get_per_process_memory_fraction", None)) is not None:
            free = min(free, int(share(device) * total) - torch.cuda.memory_reserved(device))
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit = _free_by_control_group()
    return available_bytes() if limit is None else min(available_bytes(), limit)


def _free_by_control_group() -> int | None:
    """Return what a container's limit leaves, None where there is no limit."""
    limit, used = CONTROL_GROUP / "memory.max", CONTROL_GROUP / "memory.current"
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    return max(int(limit.read_text()) - int(used.read_text()) + _droppable_by_control_group(used.parent), 0)


def _droppable_by_control_group(folder: Path) -> int:
    """Return the bytes of files read that count as used, and that the system drops when memory is asked for."""
    counts = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    return int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))


def available_bytes() -> int:
    """Return the bytes of host memory that a program could still take, droppable pages of files included."""
    import psutil

    return psutil.virtual_memory().available


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_info_line(*names: str) -> str:
    """Return the first line of /proc/cpuinfo with one of these names, without the name; empty if there is none."""
    if not CPU_INFO.exists():
        return ""
    found = re.search(rf"^(?:{'|'.join(names)})\s*:\s*(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    return found[1] if found else ""


def _host_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _process_status(name: str) -> int | None:
    """Return the bytes in one line of /proc/self/status, or None where the system has none."""
    if not PROCESS_STATUS.exists():
        return None
    found = re.search(rf"^{name}:\s*(\d+) kB$", PROCESS_STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
