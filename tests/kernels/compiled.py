"""Compiles Triton kernels for a GPU that is not there, instead of launching them.

Under the interpreter a kernel is Python, which forgives what the compiler does not: names that change their type, wrong
constants, layouts that do not exist. CI has no GPU, but Triton needs none to compile down to PTX.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
HOPPER = ("cuda", 90, 32)


def compile_launches(monkeypatch: pytest.MonkeyPatch, *stems: str) -> list[str]:
    """Have the kernels of `halfbyte.kernels.<stem>` compiled where they would be launched; return the PTX of each."""
    compiled: list[str] = []
    for stem in stems:
        module = importlib.import_module(f"halfbyte.kernels.{stem}")
        name = "launch_kernel" if hasattr(module, "launch_kernel") else "launch"
        monkeypatch.setattr(module, name, _compiler(compiled))
    return compiled


def _compiler(compiled: list[str]) -> Callable[..., None]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_instead(kernel: Any, grid: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
        assert grid > 0
        names = [parameter.name for parameter in kernel.params]
        signature, attributes = {}, {}
        for index, (name, argument) in enumerate(zip(names, arguments, strict=False)):
            if isinstance(argument, torch.Tensor):
                signature[name] = POINTERS[argument.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(argument, int) else "fp32"
        assert names[len(arguments) :] == [name for name in names if name in constants], "constants come last"
        signature |= dict.fromkeys(names[len(arguments) :], "constexpr")
        source = ASTSource(
            kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
        )
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        compiled.append(triton.compile(source, target=GPUTarget(*HOPPER), options=options).asm["ptx"])

    return compile_instead
