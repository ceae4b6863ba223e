"""State in pinned host memory."""

from __future__ import annotations

import pytest
import torch

from halfbyte.memory.paged_state import PagedState


def test_paged_state_is_plain_memory_on_a_cpu() -> None:
    paged = PagedState(torch.device("cpu"))
    state = paged.zeros(3, 4, dtype=torch.uint8)
    assert paged.nbytes == 12
    assert state.device.type == "cpu"
    assert not state.any()


def test_paged_state_fetch_copies_what_evict_wrote() -> None:
    paged = PagedState(torch.device("cpu"))
    state = paged.zeros(3, 4, dtype=torch.float32)
    values = torch.randn(2, 4)
    paged.evict(state[1:], values)
    fetched = paged.fetch(state[1:])
    state.zero_()
    assert torch.equal(fetched, values)


@pytest.mark.gpu
def test_paged_state_is_pinned_and_waits_for_the_device() -> None:
    paged = PagedState(torch.device("cuda"))
    state = paged.zeros(1 << 22, dtype=torch.float32)
    assert state.is_pinned()
    before = torch.cuda.memory_allocated()
    values = torch.full((1 << 22,), 3.0, device="cuda")
    # Long enough that a copy on the host would overtake it.
    torch.cuda._sleep(200_000_000)
    state.copy_(values, non_blocking=True)
    assert (paged.fetch(state) == 3).all()
    del values
    assert torch.cuda.memory_allocated() == before
