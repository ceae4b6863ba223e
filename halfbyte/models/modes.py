"""Train or eval mode for a while, and layers that are computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def eval_mode(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Put a model into eval mode (or train mode), and each of its modules back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def train_mode(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Put a model into train mode, and each of its modules back into the mode it was in."""
    return eval_mode(model, training=True)


def checkpoint_layers_(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Have a model's layers computed again in the backward.

    Args:
        model: Of a class of transformers that knows how.
        options: Of `torch.utils.checkpoint`; without reentrance unless given.
    """
    # The name that newer transformers have for it comes first; the other one warns there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or {"use_reentrant": False})
