"""The ring of slots: every block that enters has its own weights, whatever the order; few copies in the usual one."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch

from halfbyte.errors import PlanError
from halfbyte.memory.block_streamer import BlockStreamer
from halfbyte.memory.weight_slab import WeightSlab, slab_bytes
from halfbyte.ops import quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec

CPU = torch.device("cpu")


class Block:
    """A tenant that knows what it should be given."""

    def __init__(self, number: int, streamer: BlockStreamer, device: torch.device = CPU) -> None:
        # Blocks of different sizes.
        weight = torch.full((8 + 8 * (number % 3), 64), float(number + 1), device=device)
        weights = {"q": quantize_4bit(weight, QuantSpec())}
        self.slab = WeightSlab(weights, torch.empty(slab_bytes(weights), dtype=torch.uint8))
        self.present: Mapping[str, QuantizedTensor] | None = None
        self.num_settled = 0
        self.index = streamer.admit(self)

    def settle(self, weights: Mapping[str, QuantizedTensor]) -> None:
        self.present = weights
        self.num_settled += 1

    def leave(self) -> None:
        self.present = None

    def check(self) -> None:
        assert self.present is not None
        for mine, home in zip(self.present["q"].tensors(), self.slab.weights["q"].tensors(), strict=True):
            assert mine.data_ptr() != home.data_ptr()
            assert torch.equal(mine.cpu(), home)


def make(count: int, num_slots: int) -> tuple[BlockStreamer, list[Block]]:
    streamer = BlockStreamer(CPU, num_slots=num_slots)
    return streamer, [Block(number, streamer) for number in range(count)]


@pytest.mark.parametrize("num_slots", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_steps_find_every_block_forward_and_backward(count: int, num_slots: int) -> None:
    streamer, blocks = make(count, num_slots)
    for _ in range(3):
        for block in blocks:
            streamer.enter(block.index, backward=False)
            block.check()
        for block in reversed(blocks):
            streamer.enter(block.index, backward=True)
            block.check()


def test_any_order_is_right() -> None:
    streamer, blocks = make(7, 3)
    order = random.Random(0)
    for _ in range(200):
        block = order.choice(blocks)
        streamer.enter(block.index, backward=order.random() < 0.5)
        block.check()
        for other in blocks:
            if other.present is not None:
                other.check()


def test_a_step_copies_each_block_twice_less_what_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    streamer, blocks = make(8, 3)
    fetched: list[int] = []
    vacate = streamer._vacate
    monkeypatch.setattr(streamer, "_vacate", lambda slot: (fetched.append(1), vacate(slot)))
    for _ in range(2):
        fetched.clear()
        for block in blocks:
            streamer.enter(block.index, backward=False)
        for block in reversed(blocks):
            streamer.enter(block.index, backward=True)
    # Of the second step: 3 are there at its beginning and 3 at its turn.
    assert len(fetched) == 2 * 8 - 6


def test_blocks_that_leave_hold_nothing_of_the_slots() -> None:
    streamer, blocks = make(5, 2)
    streamer.enter(0, backward=False)
    assert sum(block.num_settled for block in blocks) == 1
    streamer.enter(3, backward=False)
    assert blocks[0].present is None
    streamer.forget()
    assert blocks[3].present is None
    streamer.enter(3, backward=False)
    blocks[3].check()


def test_released_slots_are_made_anew() -> None:
    streamer, blocks = make(3, 2)
    streamer.enter(0, backward=False)
    assert streamer.slot_bytes == 2 * max(block.slab.nbytes for block in blocks)
    assert streamer.host_bytes == sum(block.slab.nbytes for block in blocks)
    streamer.release()
    streamer.enter(2, backward=True)
    blocks[2].check()


def test_one_slot_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 2"):
        BlockStreamer(CPU, num_slots=1)
