"""How fast a run is: tokens a second of training alone, and the memory it takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from halfbyte.device import peak_resident_bytes, resident_bytes


class Meter:
    """Counts tokens and the time spent training, evaluations and checkpoints left out.

    The host counts, and reads the clock only where the loop has just waited for the device anyway.

    Args:
        cards: On which the model lives, first the one where the loss is computed.
    """

    def __init__(self, cards: Sequence[torch.device]) -> None:
        self.device, self.cards = cards[0], cards
        self.num_tokens = 0
        self.num_trained_tokens = 0
        self.num_steps = 0
        self.seconds = 0.0
        self._started: float | None = None
        self._last = (0, 0, 0.0)

    def start(self) -> None:
        """Begin to count time."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop counting time."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside the `with` block."""
        was_running = self._started is not None
        if was_running and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()

    def count(self, batch: Mapping[str, Any]) -> None:
        """Add a micro-batch."""
        if self._started is None:
            self.start()
        self.num_tokens += batch["num_tokens"]
        self.num_trained_tokens += batch["num_trained"]

    def read(self) -> dict[str, float]:
        """Return the speed since the last reading and the memory now."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        now = (self.num_tokens, self.num_trained_tokens, self.seconds + running)
        tokens, trained, seconds = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        return {
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "trained_tokens_per_second": round(trained / max(seconds, 1e-9), 1),
            # Of the fullest card.
            "memory_gib": round(max(map(memory_bytes, self.cards)) / 2**30, 3),
        }

    @property
    def tokens_per_second(self) -> float:
        """The speed of all training so far."""
        return self.num_tokens / max(self.seconds, 1e-9)

    @property
    def trained_tokens_per_second(self) -> float:
        """The same of trained tokens alone."""
        return self.num_trained_tokens / max(self.seconds, 1e-9)


def memory_bytes(device: torch.device) -> int:
    """Return what this process holds on the device: reserved on a GPU, resident on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_bytes()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that this process has held on the device."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_resident_bytes()
