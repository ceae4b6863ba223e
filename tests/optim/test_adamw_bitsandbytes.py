"""Trajectories against bitsandbytes' own optimizers on the CPU, code for code."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import pytest
import torch

from halfbyte.optim import AdamW8bit, AdamW32bit
from tests.oracles import assert_close

SHAPES = ((64, 100), (4096,), (33, 129), (7,), (4095,), (3, 20_001))
NUM_STEPS = 50
Build = Callable[..., torch.optim.Optimizer]
DECAY = pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["no decay", "decay"])


class Run:
    """One optimizer on its own copy of the parameters, fed the gradients that every run is fed."""

    def __init__(self, build: Build, *, weight_decay: float, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(3)
        self.params = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in SHAPES]
        numbers = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
        self.optimizer = build([{"params": self.params[:3]}, {"params": self.params[3:], "lr": 5e-4}], **numbers)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, NUM_STEPS)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for index, param in enumerate(self.params):
            grad = torch.randn(param.shape, generator=generator)
            grad *= torch.rand(param.shape, generator=generator) ** 4 * 1e-3
            param.grad = None if (number, index) in {(5, 1), (9, 1)} else grad.to(param.dtype)
        self.optimizer.step()
        self.scheduler.step()


@DECAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adamw8bit_follows_bitsandbytes(weight_decay: float, dtype: torch.dtype) -> None:
    ours = Run(AdamW8bit, weight_decay=weight_decay, dtype=dtype)
    theirs = Run(bitsandbytes.optim.AdamW8bit, weight_decay=weight_decay, dtype=dtype)
    for number in range(NUM_STEPS):
        ours.step(number)
        theirs.step(number)
        for index, (a, b) in enumerate(zip(ours.params, theirs.params, strict=True)):
            mine, other = ours.optimizer.state[a], theirs.optimizer.state[b]
            where = f"step {number}, parameter {index}"
            if "m" in mine:
                assert_close(where, other["state1"].view(-1), mine["m"], dtype=torch.float32)
                assert_close(where, other["state2"].view(-1), mine["v"], dtype=torch.float32)
            else:
                assert torch.equal(mine["m_codes"], other["state1"].view(-1)), where
                assert torch.equal(mine["v_codes"], other["state2"].view(-1)), where
                assert torch.equal(mine["m_absmax"], other["absmax1"]), where
                assert torch.equal(mine["v_absmax"], other["absmax2"]), where
            assert_close(where, b, a, dtype=dtype)


@DECAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adamw32bit_follows_bitsandbytes(weight_decay: float, dtype: torch.dtype) -> None:
    ours = Run(AdamW32bit, weight_decay=weight_decay, dtype=dtype)
    theirs = Run(bitsandbytes.optim.AdamW32bit, weight_decay=weight_decay, dtype=dtype)
    for number in range(NUM_STEPS):
        ours.step(number)
        theirs.step(number)
    for index, (a, b) in enumerate(zip(ours.params, theirs.params, strict=True)):
        assert_close(f"parameter {index}", b, a, dtype=dtype)
        assert_close(
            f"m of {index}",
            theirs.optimizer.state[b]["state1"].view(-1),
            ours.optimizer.state[a]["m"],
            dtype=torch.float32,
        )
        assert_close(
            f"v of {index}",
            theirs.optimizer.state[b]["state2"].view(-1),
            ours.optimizer.state[a]["v"],
            dtype=torch.float32,
        )
