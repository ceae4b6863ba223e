"""Train or eval mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


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
