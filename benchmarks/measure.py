"""How single operations are timed.

On a CPU: repeated calls, the median, and the best, which on a busy machine says more. On a GPU: calls on several sets
of buffers, together larger than its cache, so that every call finds its data in memory; once launched from Python and
once replayed from a graph, which leaves the cost of launching out.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Call = Callable[[], object]
# Twice the second-level cache of an H100.
CACHE_BYTES = 100 * 2**20
# A graph takes some microseconds to start; over this many launches they do not count.
LAUNCHES_PER_GRAPH = 24


def time_on_cpu(call: Call, *, seconds: float = 1.0, warm_up: int = 2) -> tuple[float, float]:
    """Return the median and the best milliseconds of a call."""
    for _ in range(warm_up):
        call()
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < seconds:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3, min(taken) * 1e3


def time_on_gpu(calls: Sequence[Call], *, is_capturable: bool = True) -> tuple[float, float]:
    """Return the milliseconds of one call, replayed from a graph and launched from Python; medians over rounds.

    What a graph cannot capture (bitsandbytes copies tables from pageable memory) has only the second, twice.
    """
    launched = _time_rounds(lambda: _run(calls)) / len(calls)
    if not is_capturable:
        return launched, launched
    repeats = -(-LAUNCHES_PER_GRAPH // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run([*calls] * repeats)
    replayed = _time_rounds(graph.replay) / (len(calls) * repeats)
    return replayed, launched


def num_buffer_sets(bytes_per_set: int) -> int:
    """Return how many sets of buffers it takes to outgrow a GPU's cache."""
    return max(2, -(-CACHE_BYTES // bytes_per_set))


def peak_temporary_mib(call: Call) -> float | None:
    """Return how far a call raised this process's resident memory at its peak, in MiB.

    What the call returns is counted too. Freed memory that the C library holds back for reuse is given back before,
    so that it counts again. None where Linux does not let the peak be reset (it needs root).
    """
    call()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _time_rounds(call: Call, *, num_rounds: int = 15) -> float:
    for _ in range(3):
        call()
    taken = []
    for _ in range(num_rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken)
