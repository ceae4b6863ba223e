from __future__ import annotations

import pytest
import torch

from halfbyte.errors import BackendError
from halfbyte.ops.backend import resolve_backend


def test_resolve_backend_goes_by_the_device() -> None:
    assert resolve_backend("op", "auto", torch.device("cpu")) == "torch"
    assert resolve_backend("op", "auto", torch.device("cuda")) == "triton"
    assert resolve_backend("op", "torch", torch.device("cuda")) == "torch"


def test_resolve_backend_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        BackendError, match="op cannot run on cpu with backend 'triton': its kernels need an NVIDIA GPU"
    ):
        resolve_backend("op", "triton", torch.device("cpu"))
    with pytest.raises(BackendError, match="op has no backend 'fast'; there are auto, torch, triton"):
        resolve_backend("op", "fast", torch.device("cpu"))
    with pytest.raises(BackendError, match="meta tensors"):
        resolve_backend("op", "auto", torch.device("meta"))


def test_resolve_backend_allows_the_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("op", "triton", torch.device("cpu")) == "triton"
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        resolve_backend("op", "triton", torch.device("meta"))
