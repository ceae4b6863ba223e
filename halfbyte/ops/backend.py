"""Which implementation of an op runs: a registry of backends, each able to say why it cannot.

    torch    plain torch; on a CPU blocked, with reused buffers
    triton   kernels for NVIDIA GPUs; on a CPU only under Triton's interpreter (TRITON_INTERPRET=1), which is for tests

"auto" goes by the device of the tensors. A backend that was asked for and cannot run is an error that says why; no op
falls back silently.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from halfbyte.errors import BackendError


def resolve_backend(op: str, backend: str, device: torch.device) -> str:
    """Return "torch" or "triton".

    Args:
        op: Name of the op, for the message.
        backend: "auto", "torch" or "triton".
        device: Where the op's tensors are.

    Raises:
        BackendError: The backend is unknown or cannot run there.
    """
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "torch"
    if backend not in _WHY_NOT:
        raise BackendError(f"{op} has no backend {backend!r}; there are auto, {', '.join(_WHY_NOT)}")
    reason = _WHY_NOT[backend](device)
    if reason is not None:
        raise BackendError(f"{op} cannot run on {device} with backend {backend!r}: {reason}")
    return backend


def _why_not_torch(device: torch.device) -> str | None:
    return "meta tensors hold no numbers" if device.type == "meta" else None


def _why_not_triton(device: torch.device) -> str | None:
    if not _has_triton():
        return "the package triton is not installed; install it, or pass backend='torch'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return "its kernels need an NVIDIA GPU; pass backend='torch'"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


_WHY_NOT: dict[str, Callable[[torch.device], str | None]] = {"torch": _why_not_torch, "triton": _why_not_triton}
