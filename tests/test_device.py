"""Machine facts: the defaults that follow from them, and memory that stays when it is freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte import device
from halfbyte.errors import BackendError

CPU = torch.device("cpu")
X86 = "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f {}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"

COUNT_FAULTS = """
import resource
import torch
from halfbyte.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(32 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
fresh = faults()
took_effect = keep_freed_memory()
faults()
print(fresh, faults(), took_effect)
"""

SIZE = 64 << 20
WATCH_MEMORY = """
import mmap, sys
from halfbyte.device import peak_resident_bytes, resident_bytes

start = resident_bytes()
held = bytearray(b"x") * (64 << 20)
with_held = resident_bytes()
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert sum(mapped[page] for page in range(0, len(mapped), mmap.PAGESIZE)) == 0
    with_mapped = resident_bytes()
print(with_held - start, with_mapped - with_held, resident_bytes() - peak_resident_bytes())
"""


@pytest.fixture
def cpu_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(device, "CPU_INFO", path)
    return path


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        (X86.format(""), False),
        (X86.format("avx512_bf16"), True),
        (X86.format("amx_bf16 amx_tile"), True),
        (X86.format("avx512_bf16x"), False),
        (ARM.format("bf16 i8mm"), True),
        (ARM.format("ebf17"), False),
        (None, False),
    ],
)
def test_cpu_has_fast_bf16_reads_the_feature_list(cpu_info: Path, text: str | None, fast: bool) -> None:
    if text is not None:
        cpu_info.write_text(text)
    assert device.cpu_has_fast_bf16() is fast
    assert device.default_compute_dtype(CPU) == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(
    ("asked", "fast", "got", "note"),
    [
        ("auto", False, torch.float32, None),
        ("auto", True, torch.bfloat16, None),
        ("float32", True, torch.float32, None),
        (torch.bfloat16, True, torch.bfloat16, None),
        ("bfloat16", False, torch.bfloat16, "no bf16 instructions: float32 would be faster"),
        ("float16", False, torch.float32, "unusably slow on a CPU: computing in float32"),
        ("float16", True, torch.bfloat16, "unusably slow on a CPU: computing in bfloat16"),
    ],
)
def test_resolve_compute_dtype_says_what_it_replaces(
    cpu_info: Path, asked: str, fast: bool, got: torch.dtype, note: str | None
) -> None:
    cpu_info.write_text(X86.format("avx512_bf16" if fast else ""))
    resolved = device.resolve_compute_dtype(asked, CPU)
    assert resolved.dtype == got
    assert (resolved.note is None) if note is None else (resolved.note is not None and note in resolved.note)


def test_resolve_device_takes_the_default_and_refuses_what_is_not_there() -> None:
    assert device.resolve_device("auto") == device.default_device()
    assert device.resolve_device("cpu") == CPU
    for name, message in (("gpu", "allowed: auto, cpu"), ("mps", "supported are auto"), ("cuda:99", "CUDA GPUs; use")):
        with pytest.raises(BackendError, match=message):
            device.resolve_device(name)


def test_describe_machine_is_readable() -> None:
    machine = device.describe_machine()
    assert machine.num_cpus >= 1
    assert machine.torch == torch.__version__
    assert f"{machine.num_cpus} CPUs" in str(machine)
    assert "\n" not in str(machine)
    assert ("no GPU" in str(machine)) == (not torch.cuda.is_available())


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="anonymous memory apart from mapped files is told by Linux only; the next tests cover the other way",
)
def test_resident_bytes_follows_what_is_held_and_leaves_mapped_files_out(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    # In a process of its own: memory that another test freed and kept would be taken again without a trace here.
    command = [sys.executable, "-c", WATCH_MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, mapped, above_peak = map(int, done.stdout.split())
    assert abs(held - SIZE) < SIZE / 8
    assert mapped < SIZE / 8
    assert above_peak <= 0


def test_available_bytes_is_part_of_the_host() -> None:
    host = device.describe_machine().host_bytes
    assert host is not None
    assert 0 < device.available_bytes() < host


def test_resident_bytes_works_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PROCESS_STATUS", tmp_path / "absent")
    resident, peak = device.resident_bytes(), device.peak_resident_bytes()
    assert resident > 10 << 20
    # The kernel counts a process's peak in batches of pages for each thread.
    assert peak > 0.95 * resident


def test_keep_freed_memory_reuses_pages() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT_FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    fresh, kept, took_effect = done.stdout.split()
    if took_effect == "False":
        pytest.skip("this C library has no mallopt: freed memory is the system's business")
    assert 10 * int(kept) < int(fresh)


@pytest.mark.gpu
def test_default_compute_dtype_follows_the_capability() -> None:
    gpu = device.default_device()
    ampere = torch.cuda.get_device_capability(gpu) >= (8, 0)
    assert device.default_compute_dtype(gpu) == (torch.bfloat16 if ampere else torch.float16)
    assert device.resolve_device("cuda") == torch.device("cuda", 0)
    assert torch.cuda.get_device_name(gpu) in str(device.describe_machine())


def test_files_read_do_not_count_as_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 77\nfile 1200\ninactive_file 1000\nactive_file 150\n")
    assert device.free_bytes(torch.device("cpu")) == 101150
    (tmp_path / "memory.max").write_text("max\n")
    assert device.free_bytes(torch.device("cpu")) > 101150
