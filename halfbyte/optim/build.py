"""Optimizers by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from halfbyte.errors import ConfigError
from halfbyte.optim.adamw import AdamW8bit, AdamW32bit

_BUILDERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, bool]]] = {
    "adamw_8bit": (AdamW8bit, {}),
    "adamw_bnb_8bit": (AdamW8bit, {}),
    "paged_adamw_8bit": (AdamW8bit, {"paged": True}),
    "adamw_32bit": (AdamW32bit, {}),
    "paged_adamw_32bit": (AdamW32bit, {"paged": True}),
    "paged_adamw": (AdamW32bit, {"paged": True}),
    "adamw_torch": (torch.optim.AdamW, {}),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
}
OPTIMIZERS = tuple(_BUILDERS)


def build_optimizer(
    name: str,
    params: Iterable[Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Build an optimizer.

    Args:
        name: One of `OPTIMIZERS`. `adamw_bnb_8bit` is `adamw_8bit` and `paged_adamw` is `paged_adamw_32bit`, by the
            names that transformers knows them under.
        params: Parameters, or groups of them with their own numbers.
        lr: Learning rate.
        betas: Decay rates of both moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times lr.

    Raises:
        ConfigError: There is no optimizer of that name, or a number is out of range.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no optimizer is named {name!r}; {hint}there are: {', '.join(OPTIMIZERS)}")
    build, extra = _BUILDERS[name]
    return build(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **extra)
