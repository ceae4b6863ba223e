"""Adding up the ranks' gradients while the last backward of a step still computes the others.

A backward knows the gradients of the last block first. They lie in one stretch of memory, in the order of the blocks,
which is cut into pieces from its end:

    gradients    | block 0 | block 1 | ... | block 30 | block 31 |
    pieces       |       K - 1      |  ...  |    1    |     0    |

A piece whose gradients are complete is on its way at once, after all before it: every rank sends the same pieces in the
same order, whatever it is waiting for, and what is left at the end of a step. Each is added up in place.

Where memory runs out in that backward and the step is begun anew, pieces that were on their way hold the sums of all
ranks already. They are put aside, and take the place of what is computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from halfbyte.distributed.world import PIECE_BYTES, World, stretch_of


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of gradients."""

    stretch: torch.Tensor
    members: tuple[int, ...]
    """The numbers of its gradients."""


class Completion:
    """Counts the gradients of one backward.

    Args:
        pieces: What they belong to.
        act: Is called with the number of each piece that is complete, in their order.
    """

    def __init__(self, pieces: Sequence[Piece], act: Callable[[int], None]) -> None:
        self.act = act
        self._piece_of = {member: number for number, piece in enumerate(pieces) for member in piece.members}
        self._missing = [set(piece.members) for piece in pieces]
        self._next = 0

    def see(self, member: int) -> None:
        """Note that a gradient is complete."""
        self._missing[self._piece_of[member]].discard(member)
        while self._next < len(self._missing) and not self._missing[self._next]:
            self.act(self._next)
            self._next += 1


class GradientExchange:
    """What one rank adds up with the others in the steps of a run.

    Args:
        world: All ranks.
    """

    def __init__(self, world: World) -> None:
        self.world, self.piece_bytes = world, PIECE_BYTES
        self.gradients: list[torch.Tensor] = []
        self.pieces: list[Piece] = []
        """Empty where nobody else is there, or where gradients lie apart and are added up after the backward."""
        self._completion: Completion | None = None
        self._waits: list[Callable[[], None]] = []
        self._aside: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def lay(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take these tensors for the gradients from now on, each by its number; between two steps."""
        self.gradients = list(gradients)
        whole = stretch_of(self.gradients) if self.world.size > 1 else None
        self.pieces = [] if whole is None else list(_cut(whole, self.gradients, self.piece_bytes))

    def open(self) -> None:
        """Take every gradient for complete that `see` is shown from now on: the last backward of a step begins."""
        if self.pieces:
            self._completion = Completion(self.pieces, self._send)

    def see(self, member: int) -> None:
        """Send what is complete with this gradient; before `open`, nothing happens."""
        if self._completion is not None:
            self._completion.see(member)

    def send_behind(self, events: Sequence[torch.cuda.Event]) -> None:
        """Send as many pieces as there are events, each once the device has passed its own; before `open`, none."""
        if self._completion is None or not events:
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.gradients[0].device)
        with torch.cuda.stream(self._stream):
            for number, event in enumerate(events):
                self._stream.wait_event(event)
                self._send(number)

    def begin_anew(self) -> None:
        """Put aside what has been summed: this rank is to compute the gradients of the step again."""
        self._completion = None
        for number in range(len(self._aside), len(self._waits)):
            self._waits[number]()
            self._aside.append(self.pieces[number].stretch.to("cpu", copy=True))

    def finish(self) -> None:
        """Send what is left, and have all gradients be sums of all ranks'."""
        self._completion = None
        if not self.pieces:
            self.world.add_(self.gradients)
            return
        for number in range(len(self.pieces)):
            self._send(number)
        for wait in self._waits[len(self._aside) :]:
            wait()
        for piece, sums in zip(self.pieces, self._aside, strict=False):
            piece.stretch.copy_(sums)
        self._waits, self._aside = [], []

    def _send(self, number: int) -> None:
        # All before it have been sent; it may have been, before the step was begun anew.
        if number == len(self._waits):
            self._waits.append(self.world.begin_adding_(self.pieces[number].stretch))


def _cut(whole: torch.Tensor, gradients: Sequence[torch.Tensor], piece_bytes: int) -> Iterator[Piece]:
    """Yield pieces of some bytes or a little more, from the end of a stretch of gradients to its beginning."""
    members: list[int] = []
    end = whole.numel()
    for member in reversed(range(len(gradients))):
        members.append(member)
        start = int(gradients[member].storage_offset()) if member else 0
        if (end - start) * whole.itemsize >= piece_bytes or member == 0:
            yield Piece(whole[start:end], tuple(members))
            members, end = [], start
