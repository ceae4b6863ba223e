"""Slabs in files: the same bytes, whatever is asked for in which order, and nothing left behind."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch

from halfbyte.errors import PlanError
from halfbyte.memory.host_memory import allocate_on_disk
from halfbyte.memory.read_ahead import ReadAhead
from halfbyte.memory.run_shape import READ_BUFFERS
from halfbyte.memory.weight_slab import WeightSlab, slab_bytes
from halfbyte.ops import quantize_4bit
from halfbyte.quant import QuantSpec


def make_slabs(folder: Path, count: int) -> list[WeightSlab]:
    slabs = []
    for number in range(count):
        weights = {"q": quantize_4bit(torch.randn(8 + 8 * (number % 3), 64), QuantSpec())}
        memory, file = allocate_on_disk(slab_bytes(weights), folder)
        slabs.append(WeightSlab(weights, memory, file=file))
    return slabs


def make_reader(slabs: list[WeightSlab]) -> ReadAhead:
    return ReadAhead(max(slab.nbytes for slab in slabs), is_pinned=False)


class SlowCopy:
    """A copy that is over some time after it was begun."""

    def __init__(self) -> None:
        self.end = time.monotonic() + 0.01
        self.was_waited_for = False

    def synchronize(self) -> None:
        time.sleep(max(self.end - time.monotonic(), 0))
        self.was_waited_for = True


def test_any_order_gives_the_slab_that_was_asked_for(tmp_path: Path) -> None:
    slabs = make_slabs(tmp_path, 9)
    reader = make_reader(slabs)
    order = random.Random(0)
    for _ in range(100):
        first = order.randrange(9)
        coming = [(first + step) % 9 for step in range(order.randrange(1, 8))]
        reader.prepare([(index, slabs[index]) for index in coming])
        index = order.choice([first, order.randrange(9)])
        assert torch.equal(reader.take(index, slabs[index]), slabs[index].memory)
        reader.give_back(index, None)
    reader.close()


def test_no_buffer_is_written_while_it_is_copied(tmp_path: Path) -> None:
    slabs = make_slabs(tmp_path, 8)
    reader = make_reader(slabs)
    copies = []
    for index, slab in enumerate(slabs):
        taken = reader.take(index, slab)
        copies.append((SlowCopy(), taken.data_ptr()))
        reader.give_back(index, copies[-1][0])
    reused = [copy for copy, address in copies[:-READ_BUFFERS] if address in {other for _, other in copies}]
    assert reused
    assert all(copy.was_waited_for for copy in reused)
    reader.close()
    assert all(copy.was_waited_for for copy, _ in copies)


def test_what_comes_next_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    slabs = make_slabs(tmp_path, 6)
    reader = make_reader(slabs)
    reader.prepare(list(enumerate(slabs)))
    deadline = time.monotonic() + 10
    while not reader.has_arrived(READ_BUFFERS - 1):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not reader.has_arrived(READ_BUFFERS)
    reader.close()


def test_files_have_no_name(tmp_path: Path) -> None:
    slabs = make_slabs(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
    assert all(slab.is_on_disk for slab in slabs)


def test_a_file_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    slab = make_slabs(tmp_path, 1)[0]
    assert slab.file is not None
    os.ftruncate(slab.file, slab.nbytes // 2)
    with pytest.raises(OSError, match="ends after"):
        slab.read_into(torch.empty(slab.nbytes, dtype=torch.uint8))


def test_no_folder_is_a_clear_message(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"memory\.spill_folder: .*absent has no 0\.00 GiB"):
        allocate_on_disk(100, tmp_path / "absent")
