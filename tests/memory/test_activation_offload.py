"""Activations in pinned host memory: the same bits come back, on one stream after another and in a graph."""

from __future__ import annotations

import pytest
import torch

from halfbyte.memory.activation_offload import ActivationOffload, piece_sizes

NUM_BLOCKS, NUM_MICRO_BATCHES = 6, 4
# Odd, so that a tensor ends inside a piece.
SHAPES = ((1000, 333), (1000, 3, 111), (7,))


@pytest.mark.parametrize("num_bytes", [1, 4096, 4097, 100_000, 2**27, 2**27 + 1, 83_886_080])
def test_piece_sizes_are_powers_of_two_that_waste_little(num_bytes: int) -> None:
    sizes = piece_sizes(num_bytes)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= 5
    assert num_bytes <= sum(sizes) < num_bytes + max(num_bytes / 16, 4096) + 1


def test_activation_offload_on_a_cpu_leaves_tensors_where_they_are() -> None:
    offload = ActivationOffload()
    first, second = torch.randn(3, 4), torch.randn(5)
    offloaded = offload.put(first, second)
    offload.make_room()
    assert offloaded.nbytes == (12 + 5) * 4
    assert [t.data_ptr() for t in offload.get(offloaded)] == [first.data_ptr(), second.data_ptr()]
    offload.join()
    offload.release()
    assert offload.host_bytes == 0


def forward_and_backward(offload: ActivationOffload, x: torch.Tensor) -> torch.Tensor:
    """Put away what blocks compute, and sum it up backward, with much other use of the same memory in between."""
    kept = []
    for block in range(NUM_BLOCKS):
        tensors = [torch.full(shape, block + 1.0, device="cuda", dtype=torch.bfloat16) * x for shape in SHAPES]
        kept.append(offload.put(*tensors))
        del tensors
        spoil()
        offload.make_room()
        spoil()
    total = torch.zeros(NUM_BLOCKS, device="cuda")
    for block in reversed(range(NUM_BLOCKS)):
        tensors = offload.get(kept.pop())
        spoil()
        # Equal numbers everywhere, or the spread shows.
        total[block] = sum(t.amax().float() + 1000 * (t.amax() - t.amin()) for t in tensors)
        del tensors
        spoil()
    return total


def spoil() -> None:
    for shape in SHAPES:
        torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)


def expected(x: float) -> torch.Tensor:
    return torch.arange(1, NUM_BLOCKS + 1, device="cuda", dtype=torch.float32) * x * len(SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("delayed", ["compute", "copies", "neither"])
def test_activation_offload_brings_back_the_same_bits(delayed: str) -> None:
    offload, x = ActivationOffload(), torch.ones((), device="cuda", dtype=torch.bfloat16)
    sizes = set()
    for number in range(NUM_MICRO_BATCHES):
        if delayed == "compute":
            torch.cuda._sleep(100_000_000)
        if delayed == "copies" and offload._copies:
            with torch.cuda.stream(offload._copies[x.device]):
                torch.cuda._sleep(100_000_000)
        x.fill_(number + 1)
        assert forward_and_backward(offload, x).equal(expected(number + 1))
        sizes.add(offload.host_bytes)
    assert len(sizes) == 1
    assert all(piece.is_pinned() for piece in offload.host_memory)
    offload.release()
    assert offload.host_bytes == 0


@pytest.mark.gpu
def test_activation_offload_works_inside_a_graph() -> None:
    offload, x = ActivationOffload(), torch.ones((), device="cuda", dtype=torch.bfloat16)
    forward_and_backward(offload, x)
    torch.cuda.synchronize()
    offload.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = forward_and_backward(offload, x)
    held = offload.host_memory
    offload.release()
    for number in range(NUM_MICRO_BATCHES):
        x.fill_(number + 1)
        graph.replay()
        assert total.equal(expected(number + 1))
        # Beside the graph, which keeps its own host memory.
        assert forward_and_backward(offload, x).equal(expected(number + 1))
    torch.cuda.synchronize()
    del held


@pytest.mark.gpu
def test_activation_offload_gives_twice_until_the_next_forward() -> None:
    offload, x = ActivationOffload(), torch.ones(2**20, device="cuda")
    kept = [offload.put(x * block) for block in range(4)]
    for _ in range(2):
        for block in reversed(range(4)):
            assert (offload.get(kept[block])[0] == block).all()
    offload.put(x)
    with pytest.raises(RuntimeError, match="before the next forward"):
        offload.get(kept[0])
    offload.join()


@pytest.mark.gpu
def test_activation_offload_survives_a_forward_without_backward() -> None:
    offload, x = ActivationOffload(), torch.ones((), device="cuda", dtype=torch.bfloat16)
    forward_and_backward(offload, x)
    before = offload.host_bytes
    for _ in range(3):
        offload.make_room()
        offload.put(torch.ones(1000, 333, device="cuda"))
    assert forward_and_backward(offload, x).equal(expected(1))
    assert offload.host_bytes == before
