"""What is complete is sent in one order, whatever comes first; ranks that do so are in test_ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.distributed import World
from halfbyte.train.gradient_exchange import Completion, GradientExchange, Piece
from halfbyte.train.micro_batch import lay_side_by_side


@dataclasses.dataclass(frozen=True)
class Doubling(World):
    """Two ranks of which the other one has the same numbers; notes what was sent and waited for."""

    log: list[str] = dataclasses.field(default_factory=list)

    def begin_adding_(self, tensor: torch.Tensor) -> Callable[[], None]:
        name = f"{tensor.storage_offset()}+{tensor.numel()}"
        self.log.append(f"send {name}")
        tensor.mul_(2)
        return lambda: self.log.append(f"wait {name}")


def make_exchange(*, piece_bytes: int = 1024) -> tuple[GradientExchange, Doubling]:
    """Return one of five gradients of 120 numbers each, which take the place of 128."""
    world = Doubling(size=2)
    exchange = GradientExchange(world)
    exchange.piece_bytes = piece_bytes
    exchange.lay(lay_side_by_side([torch.empty(120) for _ in range(5)]))
    return exchange, world


def test_pieces_are_cut_from_the_end_and_hold_everything() -> None:
    exchange, _ = make_exchange()
    assert [piece.members for piece in exchange.pieces] == [(4, 3), (2, 1), (0,)]
    assert [piece.stretch.numel() for piece in exchange.pieces] == [256, 256, 128]
    for number, gradient in enumerate(exchange.gradients):
        gradient.fill_(number + 1)
    for piece in exchange.pieces:
        expected = torch.cat([exchange.gradients[member] for member in reversed(piece.members)])
        assert piece.stretch[piece.stretch != 0].equal(expected)


def test_a_piece_is_sent_once_all_of_it_and_all_before_it_are_there() -> None:
    exchange, world = make_exchange()
    exchange.see(4)
    exchange.open()
    for member in (3, 0, 2):
        exchange.see(member)
    assert world.log == []
    exchange.see(4)
    assert world.log == ["send 384+256"]
    exchange.see(1)
    assert world.log == ["send 384+256", "send 128+256", "send 0+128"]
    exchange.finish()
    assert world.log[3:] == ["wait 384+256", "wait 128+256", "wait 0+128"]
    # The next micro-batch is not the last of its step.
    exchange.see(4)
    exchange.see(3)
    assert len(world.log) == 6


def test_what_nobody_has_seen_is_sent_at_the_end_in_the_same_order() -> None:
    exchange, world = make_exchange()
    exchange.finish()
    assert [line for line in world.log if "send" in line] == ["send 384+256", "send 128+256", "send 0+128"]
    exchange.open()
    exchange.see(0)
    exchange.finish()
    assert world.log[:6] == world.log[6:]


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_that_is_begun_anew_keeps_what_has_been_summed(times: int) -> None:
    exchange, world = make_exchange()

    def compute(members: tuple[int, ...]) -> None:
        for gradient in exchange.gradients:
            gradient.zero_()
        exchange.open()
        for member in members:
            exchange.gradients[member].fill_(member + 1)
            exchange.see(member)

    for number in range(times):
        compute((4, 3, 2, 1)[: 2 + 2 * number])
        exchange.begin_anew()
    compute((4, 3, 2, 1, 0))
    exchange.finish()
    assert [gradient.unique().item() for gradient in exchange.gradients] == [2, 4, 6, 8, 10]
    assert len([line for line in world.log if "send" in line]) == 3


def test_gradients_that_lie_apart_are_not_sent_in_pieces() -> None:
    exchange = GradientExchange(Doubling(size=2))
    exchange.lay(lay_side_by_side([torch.empty(3), torch.empty(3, dtype=torch.float16)]))
    assert exchange.pieces == []
    alone = GradientExchange(World())
    alone.lay(lay_side_by_side([torch.empty(3)]))
    assert alone.pieces == []
    alone.open()
    alone.see(0)
    alone.finish()


@given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=4))
def test_completion_tells_every_piece_once_and_in_order(order: list[int], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), 12]
    pieces = [Piece(torch.empty(0), tuple(range(a, b))) for a, b in itertools.pairwise(edges) if a < b]
    told: list[tuple[int, int]] = []
    completion = Completion(pieces, lambda piece: told.append((piece, len(seen))))
    seen: set[int] = set()
    for member in order:
        seen.add(member)
        completion.see(member)
    assert [piece for piece, _ in told] == list(range(len(pieces)))
    for piece, count in told:
        assert {member for one in pieces[: piece + 1] for member in one.members} <= set(order[:count])
