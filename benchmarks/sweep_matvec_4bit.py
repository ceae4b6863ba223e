"""Every way to launch the 4-bit matrix-vector kernel on the shapes that decoding a 7B model takes: python -m this.

Each is compared with the product in fp64 (largest error, over the result's RMS) and timed from a graph's replay over
weights that together outgrow the GPU's cache. A table per shape and number of tokens, the fastest first; `gb_per_s`
counts codes and scales. Kernels are compiled by as many processes as there are cores, without being launched. A launch
that does not compile or is wrong says so in one line; one that breaks the CUDA context is left out of a fresh start.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from typing import Any

import torch

from benchmarks.bench_matvec_4bit import make_weights
from benchmarks.measure import time_on_gpu
from halfbyte.kernels import matvec_4bit as kernels
from halfbyte.kernels.matvec_4bit import MatvecLaunch
from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.matvec_4bit import matvec_4bit_triton
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec

Shape = tuple[int, int]
SHAPES = [(11008, 4096), (4096, 4096), (4096, 11008), (12288, 4096), (22016, 4096)]
TOKEN_SHAPES = [(11008, 4096), (4096, 4096)]
LAUNCHES = [
    *(
        MatvecLaunch(lookup="tensor", rows_per_program=rows, num_warps=num_warps, prefetch=prefetch, ask_first=ask)
        for (rows, num_warps), prefetch, ask in itertools.product(
            ((16, 2), (16, 4), (16, 8), (32, 4), (32, 8)), (False, True), (False, True)
        )
    ),
    *(
        MatvecLaunch(lookup="tensor", rows_per_program=16, num_warps=16, prefetch=False, ask_first=a)
        for a in (False, True)
    ),
    *(
        MatvecLaunch(lookup="shuffle", rows_per_program=rows, num_warps=num_warps, prefetch=prefetch, ask_first=ask)
        for (rows, num_warps), (prefetch, ask) in itertools.product(
            ((4, 1), (8, 1), (4, 2), (8, 2), (2, 4), (4, 4), (8, 4)), ((False, False), (False, True), (True, False))
        )
    ),
    *(
        MatvecLaunch(lookup="permute", rows_per_program=4, num_warps=num_warps, prefetch=False, ask_first=ask)
        for num_warps, ask in ((4, False), (4, True), (1, True))
    ),
    MatvecLaunch(lookup="codes", rows_per_program=4, num_warps=4, prefetch=False),
]
TOKEN_LAUNCHES = [
    *(
        MatvecLaunch(lookup="tensor", rows_per_program=rows, num_warps=num_warps, prefetch=prefetch, ask_first=ask)
        for (rows, num_warps), (prefetch, ask) in itertools.product(
            ((16, 4), (16, 8), (32, 4)), ((False, False), (False, True), (True, False))
        )
    ),
    MatvecLaunch(lookup="shuffle", rows_per_program=4, num_warps=4, prefetch=False),
]
Job = tuple[MatvecLaunch, int, int]


def cases() -> list[tuple[Shape, int, list[MatvecLaunch]]]:
    """Return shapes, numbers of tokens and launches, the most telling first."""
    single = [(shape, 1, LAUNCHES) for shape in SHAPES]
    return [*single, *((shape, tokens, TOKEN_LAUNCHES) for tokens in (8, 4, 2) for shape in TOKEN_SHAPES)]


def compile_one(job: Job) -> str | None:
    """Compile what a launch needs, launching nothing; return the first line of what went wrong."""
    launch, num_tokens, in_features = job

    def warm_up(kernel: Any, grid: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
        kernel.warmup(*arguments, grid=(grid,), num_warps=num_warps, enable_fp_fusion=False, **constants)

    kernels.launch_kernel = warm_up
    q = quantize_4bit(torch.randn(64, in_features, dtype=torch.bfloat16, device="cuda"), QuantSpec())
    x = torch.zeros(num_tokens, in_features, dtype=torch.bfloat16, device="cuda")
    try:
        matvec_4bit_triton(x, q, launch=launch)
    except Exception as error:
        return first_line(error)
    return None


def compile_all(num_processes: int) -> set[Job]:
    """Compile every kernel into Triton's cache; return the jobs that failed."""
    jobs = list(dict.fromkeys((launch, t, shape[1]) for shape, t, launches in cases() for launch in launches))
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        results = dict(zip(jobs, pool.map(compile_one, jobs, chunksize=1), strict=True))
    for job, failure in results.items():
        if failure is not None:
            print(f"does not compile: {name_of(job[0])} tokens {job[1]} in_features {job[2]}: {failure}")
    return {job for job, failure in results.items() if failure is not None}


def measure(launch: MatvecLaunch, x: torch.Tensor, weights: list[QuantizedTensor], exact: torch.Tensor) -> Any:
    """Return microseconds replayed and launched, bytes a second, and the largest error over the result's RMS."""
    y = matvec_4bit_triton(x, weights[-1], launch=launch)
    error = ((y.double() - exact).abs().max() / exact.square().mean().sqrt()).item()
    ms, launched = time_on_gpu([lambda q=q: matvec_4bit_triton(x, q, launch=launch) for q in weights])
    return ms * 1e3, launched * 1e3, weights[0].nbytes / ms / 1e6, error


def name_of(launch: MatvecLaunch) -> str:
    asks, ahead = "asks" if launch.ask_first else "", "ahead" if launch.prefetch else ""
    return f"{launch.lookup:8} rows {launch.rows_per_program:2} warps {launch.num_warps:2} {ahead:5} {asks:4}"


def first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="stop measuring after so long")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="to compile with")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--left-out", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    failed = compile_all(options.processes)
    print(f"compiled after {time.time() - options.started:.1f} s", flush=True)
    torch.manual_seed(0)
    device = torch.device("cuda")
    made: dict[Shape, tuple[list[QuantizedTensor], torch.Tensor]] = {}
    for shape, num_tokens, launches in cases():
        if shape not in made:
            weights = make_weights(shape, QuantSpec(), device)
            made[shape] = weights, dequantize_4bit_reference(weights[0], dtype=torch.float32)
        weights, expanded = made[shape]
        x = torch.randn(num_tokens, shape[1], dtype=torch.bfloat16, device=device)
        exact = x.double() @ expanded.double().T
        results: list[tuple[Any, MatvecLaunch]] = []
        for launch in launches:
            is_left_out = f"{name_of(launch)} {shape} {num_tokens}" in options.left_out
            if (
                is_left_out
                or (launch, num_tokens, shape[1]) in failed
                or time.time() - options.started > options.seconds
            ):
                continue
            try:
                results.append((measure(launch, x, weights, exact), launch))
            except Exception as error:
                print(f"failed: {name_of(launch)} {shape} {num_tokens}: {first_line(error)}", flush=True)
                if "CUDA error" in str(error):
                    leave_out = ["--left-out", f"{name_of(launch)} {shape} {num_tokens}"]
                    arguments = [*sys.argv[1:], "--started", str(options.started), *leave_out]
                    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.sweep_matvec_4bit", *arguments])
        print(f"\n{shape[0]} x {shape[1]}, tokens {num_tokens}; {time.time() - options.started:.1f} s")
        for (us, us_launched, gb_per_s, error), launch in sorted(results, key=lambda result: result[0][0]):
            wrong = "" if error < 0.03 else "  WRONG"
            print(
                f"{us:7.2f} us {gb_per_s:5.0f} GB/s  launched {us_launched:6.1f} us  "
                f"error {error:.1e}  {name_of(launch)}{wrong}"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
