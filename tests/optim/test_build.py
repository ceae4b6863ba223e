"""Optimizers by name."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.optim import OPTIMIZERS, AdamW8bit, AdamW32bit, build_optimizer

EXPECTED = {
    "adamw_8bit": (AdamW8bit, False),
    "adamw_bnb_8bit": (AdamW8bit, False),
    "paged_adamw_8bit": (AdamW8bit, True),
    "adamw_32bit": (AdamW32bit, False),
    "paged_adamw_32bit": (AdamW32bit, True),
    "paged_adamw": (AdamW32bit, True),
    "adamw_torch": (torch.optim.AdamW, False),
    "adamw_torch_fused": (torch.optim.AdamW, False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_optimizer_gives_the_kind_and_moves_parameters(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(70, 70))
    optimizer = build_optimizer(name, [param], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    kind, paged = EXPECTED[name]
    assert type(optimizer) is kind
    assert getattr(optimizer, "paged", False) is paged
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 1e-6, 0.5)
    assert bool(group.get("fused")) is (name == "adamw_torch_fused")
    param.grad = torch.ones_like(param)
    optimizer.step()
    expected = 1 - 1e-2 * 0.5 - 1e-2
    torch.testing.assert_close(param.detach(), torch.full_like(param, expected))


def test_build_optimizer_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'paged_adamw_8bit'\?.*adamw_torch_fused"):
        build_optimizer("paged_adam_8bit", [torch.nn.Parameter(torch.zeros(1))], lr=1e-3)


def test_optimizers_are_those_tested() -> None:
    assert set(OPTIMIZERS) == set(EXPECTED)
