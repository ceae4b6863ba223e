"""One interface to the two dropouts that a fused block may use for an adapter's input.

On a GPU the mask is a function of a counter, see `counter_dropout`, and kernels that pass over the elements anyway
apply it. On a CPU a hash of every element would cost more than the rest: there the places of the dropped elements are
drawn once, see `dropout`, kept, and visited. Without dropout the adapter's input is the input itself.
"""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.ops.counter_dropout import CounterDropout, DropoutSeeds, drop_copy
from halfbyte.ops.dropout import apply_dropout, draw_dropout, drop_
from halfbyte.ops.workspace import Workspace

DROPPED_BUFFER = "dropped_input"


@dataclasses.dataclass(slots=True)
class BlockDropout:
    """Which elements of one input its adapters do not see in one call, forward and backward."""

    probability: float
    counter: CounterDropout | None
    """None on a CPU and without dropout."""
    positions: torch.Tensor | None = None
    """On a CPU, once drawn."""

    @property
    def scale(self) -> float:
        """1 / (1 - p)."""
        return 1 / (1 - self.probability)

    def dropped(self, x: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        """Return what the adapters see of `x`."""
        if not self.probability:
            return x
        out = workspace.take(DROPPED_BUFFER, tuple(x.shape), dtype=x.dtype, device=x.device)
        if self.counter is not None:
            return drop_copy(x, self.counter, out=out)
        if self.positions is None:
            self.positions = draw_dropout(x, probability=self.probability)
        return apply_dropout(x, self.positions, out=out)

    def drop_(self, x: torch.Tensor) -> torch.Tensor:
        """Set what the adapters did not see to zero, in place, in a contiguous `x`."""
        if self.counter is not None:
            return drop_copy(x, self.counter, out=x)
        return x if self.positions is None else drop_(x, self.positions)

    def drop_unless_done_(self, x: torch.Tensor) -> torch.Tensor:
        """The same, where a kernel that was given the counter wrote `x`."""
        return x if self.counter is not None else self.drop_(x)


def draw_block_dropout(probability: float, *, by_counter: bool, seeds: DropoutSeeds) -> BlockDropout:
    """Return a dropout for one input of one call."""
    return BlockDropout(probability, seeds.draw(probability) if by_counter else None)
