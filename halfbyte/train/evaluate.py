"""Held-out loss: the mean cross-entropy of all trained tokens, weighted by token and not by batch.

No logits are kept, nothing is drawn at random, and the model comes back in the mode it was in: training with
evaluations in between is training without them, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.distributed import ALONE, World
from halfbyte.errors import DataError
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.modes import eval_mode
from halfbyte.train.batches import move_batch
from halfbyte.train.loss import LossPath


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """How well a model predicts text that it was not trained on."""

    loss: float
    """Mean cross-entropy a token, in nats."""
    num_tokens: int
    """Tokens that were predicted."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f} over {self.num_tokens:,} tokens"


def evaluate_loss(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss_path: LossPath | None = None,
    world: World = ALONE,
) -> HeldOut:
    """Measure a model on batches; with its adapters unless they are disabled around the call.

    Args:
        model: The model.
        batches: As `halfbyte.train.batches` makes them.
        loss_path: How its loss is computed, where the caller has that already.
        world: Whose ranks have the other batches.

    Raises:
        DataError: The batches hold no trained token.
    """
    loss_path = loss_path or LossPath(model)
    device = compute_device_of(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = 0
    with eval_mode(model):
        for batch in batches:
            total += loss_path.sum_losses(move_batch(batch, device))
            num_tokens += batch["num_trained"]
    loss, num_all = world.sum(total.item(), num_tokens)
    if num_all == 0:
        raise DataError("the held-out examples have no token to predict; give longer ones")
    return HeldOut(loss=loss / num_all, num_tokens=int(num_all))
