"""Optimizers: AdamW with 8-bit or 32-bit moments in flat state, paged or not, and torch's own."""

from halfbyte.optim.adamw import AdamW8bit, AdamW32bit
from halfbyte.optim.build import OPTIMIZERS, build_optimizer

__all__ = ["OPTIMIZERS", "AdamW8bit", "AdamW32bit", "build_optimizer"]
