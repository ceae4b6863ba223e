"""Steps that must not be applied: what they held is kept for whoever wants to know why, and the run stops or skips.

A bad step is one whose loss or gradient is not finite, or, where `loss_spike` is set, whose loss is so many times the
running mean of the losses before. Its examples go to bad_batches/step-<N>.jsonl in the output folder, an example a
line: origin, text, token ids, their labels (the token that is to follow, -100 where none is learned), and the loss of
the micro-batch it was in.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from halfbyte.data.packing import IGNORE_INDEX
from halfbyte.distributed import ALONE, World
from halfbyte.errors import HalfbyteError

FOLDER = "bad_batches"
NAMED_EXAMPLES = 12
# So many bad steps one after the other are no matter of a few examples.
MOST_SKIPPED_IN_A_ROW = 10

OnBadStep = Literal["stop", "skip"]


class DivergedError(HalfbyteError):
    """A loss or gradient that is not finite, or a loss far above those before."""


@dataclasses.dataclass(frozen=True, slots=True)
class SeenBatch:
    """A micro-batch of a step, and what came of it."""

    loss: torch.Tensor
    origins: Sequence[str]
    inputs: Mapping[str, Any] | None = None
    """As the loader gave it."""


@dataclasses.dataclass(frozen=True, slots=True)
class BadStep:
    """A step that changed nothing."""

    step: int
    batches: Sequence[SeenBatch]
    """Of this rank."""
    loss: float
    """Of all ranks, as far as it was computed."""
    loss_limit: float | None = None
    """What its loss was not to exceed."""

    @property
    def what(self) -> str:
        """What was wrong with it."""
        bad = [loss for batch in self.batches if not math.isfinite(loss := batch.loss.item())]
        if bad:
            return f"loss is {bad[0]}"
        if self.loss_limit is not None and self.loss > self.loss_limit:
            return f"loss is {self.loss:.4g}, above the {self.loss_limit:.4g} that train.loss_spike allows here"
        return "gradient is not finite"

    @property
    def is_mine(self) -> bool:
        """Whether this rank computed a loss that is not finite."""
        return any(not math.isfinite(batch.loss.item()) for batch in self.batches)

    @property
    def named(self) -> str:
        """The examples at fault, or all where that cannot be told."""
        bad = [batch for batch in self.batches if not batch.loss.isfinite()]
        origins = [origin for batch in bad or self.batches for origin in batch.origins]
        named = ", ".join(dict.fromkeys(origins[:NAMED_EXAMPLES])) or "unknown"
        return named + (f" and {len(origins) - NAMED_EXAMPLES} more" if len(origins) > NAMED_EXAMPLES else "")


class BadSteps:
    """Keeps what bad steps held, and decides whether the run goes on.

    Args:
        folder: Of the run; None keeps nothing.
        tokenizer: For the text of examples.
        on_bad_step: Whether to stop at the first.
        tell: Is told of each that is skipped.
        world: Whose ranks have their part of each; they decide alike.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        on_bad_step: OnBadStep = "stop",
        tell: Callable[[str], None] = lambda text: None,
        world: World = ALONE,
    ) -> None:
        self.folder, self.tokenizer, self.tell, self.world = folder, tokenizer, tell, world
        self.skips = on_bad_step == "skip"
        self._last_step, self._in_a_row = 0, 0

    def take(self, bad: BadStep) -> None:
        """Keep what a bad step held.

        Raises:
            DivergedError: The run is to stop.
        """
        self._in_a_row = self._in_a_row + 1 if bad.step == self._last_step + 1 else 1
        self._last_step = bad.step
        # Of all ranks, tell of the first whose loss was bad.
        _, what, named = min(self.world.gather([not bad.is_mine, bad.what, bad.named]), key=lambda one: one[0])
        text = f"step {bad.step}: the {what}. The batch holds {named}. Nothing of that step was applied"
        kept = self._keep(bad)
        if self.skips and self._in_a_row < MOST_SKIPPED_IN_A_ROW:
            self.tell(f"{text}; it is skipped. {kept}")
            return
        if self.skips:
            raise DivergedError(
                f"{text}, nor of the {self._in_a_row - 1} before it. {kept}Train with a lower learning_rate"
            )
        raise DivergedError(
            f"{text}. {kept}Look at these examples, train with a lower learning_rate, or pass over such steps with "
            "train.on_bad_step=skip"
        )

    def _keep(self, bad: BadStep) -> str:
        """Write the examples, and return a sentence that says where."""
        if self.folder is None or any(batch.inputs is None for batch in bad.batches):
            return ""
        rank = f"-rank-{self.world.rank}" if self.world.size > 1 else ""
        path = self.folder / FOLDER / f"step-{bad.step}{rank}.jsonl"
        rows = [row for batch in bad.batches for row in _rows_of(batch, self.tokenizer)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            return f"It could not be kept for inspection: {error.strerror}. "
        return f"It is kept in {path}. "


def _rows_of(batch: SeenBatch, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, Any]]:
    """Return the examples of a micro-batch: of a packed one its documents, of a padded one its rows."""
    assert batch.inputs is not None
    ids, labels = batch.inputs["input_ids"].cpu(), batch.inputs["labels"].cpu()
    if "cu_seq_lens" in batch.inputs:
        bounds = batch.inputs["cu_seq_lens"].tolist()
        documents = [(ids.flatten()[a:b], labels.flatten()[a:b]) for a, b in itertools.pairwise(bounds)]
        # What a row is filled up with is a document too, from which nothing is learned and that comes from nowhere.
        is_filled = len(documents) > len(batch.origins)
        pieces = [piece for piece in documents if not is_filled or bool((piece[1] != IGNORE_INDEX).any())]
    else:
        pieces = list(zip(ids, labels, strict=True))
    is_clear = len(pieces) == len(batch.origins)
    loss = batch.loss.item()
    return [
        {
            "origin": batch.origins[number] if is_clear else list(batch.origins),
            "micro_batch_loss": loss,
            "text": None if tokenizer is None else tokenizer.decode(tokens),
            "input_ids": tokens.tolist(),
            "labels": wanted.tolist(),
        }
        for number, (tokens, wanted) in enumerate(pieces)
    ]
