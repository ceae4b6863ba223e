"""Launching Triton kernels with little work on the host.

    launch(kernel, grid, *arguments, num_warps=4, CONSTANT=...)

Triton's own way finds out at every launch which compiled form the arguments need, which takes 50 us and more: longer
than many kernels run. Here that decision is remembered. Its key is what Triton specialises on: dtype of a tensor and
whether its address is a multiple of 16; whether an integer is 1, a multiple of 16 or needs 64 bits; and the constants.
The first launch of every key goes through Triton.

A kernel's constants come last in its signature. There is no fused multiply-add across operations
(enable_fp_fusion=False), so that every device rounds alike.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument and torch's current stream.

    Args:
        kernel: What `triton.jit` made.
        grid: How many programs.
        *arguments: In the order of the signature: tensors, integers and floats. The first is a tensor.
        num_warps: Of a program.
        **constants: Its constexpr arguments. With a true OVERLAP it may start while the launch before it still runs
            (programmatic dependent launch, for compute capability 9.0 and newer), and waits by itself where it must.
    """
    if not arguments[0].is_cuda:
        # Under the interpreter.
        kernel[(grid,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
        return
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    if constants.get("OVERLAP", False):
        options["launch_pdl"] = True
    device = arguments[0].device.index
    on_device = device == torch.cuda.current_device()
    with contextlib.nullcontext() if on_device else torch.cuda.device(device):
        key = (kernel.fn, device, num_warps, *constants.values(), *map(_kind_of, arguments))
        found = _COMPILED.get(key)
        if found is None:
            compiled = kernel[(grid,)](*arguments, **constants, **options)
            names = [parameter.name for parameter in kernel.params][len(arguments) :]
            _COMPILED[key] = (compiled, tuple(constants[name] for name in names))
            return
        compiled, ordered = found
        compiled[(grid, 1, 1)](*arguments, *ordered)


def _kind_of(argument: Any) -> Any:
    """Return what Triton specialises on."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    if isinstance(argument, int):
        return argument == 1, argument & 15 == 0, argument.bit_length() > 31
    return float
