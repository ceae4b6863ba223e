"""Copies of many tensors in host memory."""

from __future__ import annotations

import pytest
import torch

from halfbyte.memory.host_copy import TRANSFER_BYTES, _pieces, copy_to_host

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make_tensors(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(5, 7, generator=generator), torch.arange(6, dtype=torch.uint8).view(2, 3)]
    tensors += [torch.tensor(4.0), torch.randn(0, 3), torch.randn(9, generator=generator).to(torch.bfloat16)]
    # One that is larger than a piece, and enough to need several.
    tensors += [
        torch.randn(numel, generator=generator) for numel in (TRANSFER_BYTES // 4 + 1, 7, TRANSFER_BYTES // 8, 3)
    ]
    placed = [tensor.to(device) for tensor in tensors]
    return [*placed, placed[0].T, torch.nn.Parameter(placed[0])]


@DEVICES
def test_copies_are_equal_contiguous_and_in_host_memory(device: str) -> None:
    tensors = make_tensors(device)
    for copy, tensor in zip(copy_to_host(tensors), tensors, strict=True):
        assert copy.device.type == "cpu"
        assert copy.is_contiguous()
        assert not copy.requires_grad
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(copy, tensor.detach().cpu())


@DEVICES
def test_copies_share_nothing(device: str) -> None:
    tensor = torch.arange(3.0, device=device)
    values = {"a": [tensor, (1, tensor)], "b": {"c": tensor, "d": None}, "e": "text"}
    copied = copy_to_host(values)
    tensor.zero_()
    for found in (copied["a"][0], copied["a"][1][1], copied["b"]["c"]):
        assert found.tolist() == [0, 1, 2]
    copied["a"][0].zero_()
    assert copied["b"]["c"].tolist() == [0, 1, 2]
    copied["a"].clear()
    assert len(values["a"]) == 2
    assert (copied["a"], copied["b"]["d"], copied["e"]) == ([], None, "text")


def test_nothing_to_copy() -> None:
    assert copy_to_host({"step": 3, "groups": [], "nested": {}}) == {"step": 3, "groups": [], "nested": {}}


@pytest.mark.parametrize(
    "sizes", [[1], [3, 2, 4], [TRANSFER_BYTES], [TRANSFER_BYTES + 5, 1], [1, TRANSFER_BYTES, TRANSFER_BYTES]]
)
def test_pieces_are_whole_tensors_in_order_and_bounded(sizes: list[int]) -> None:
    tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    pieces = list(_pieces(tensors))
    assert [tensor for piece in pieces for tensor in piece] == tensors
    for number, piece in enumerate(pieces):
        assert len(piece) == 1 or sum(map(len, piece)) <= TRANSFER_BYTES
        assert number == 0 or sum(map(len, pieces[number - 1])) + len(piece[0]) > TRANSFER_BYTES


@pytest.mark.gpu
def test_copies_come_after_what_is_queued_and_before_what_follows() -> None:
    tensors = [torch.zeros(numel, device="cuda") for numel in (1000, 7, TRANSFER_BYTES // 2)]
    torch.cuda._sleep(200_000_000)
    torch._foreach_add_(tensors, 3.0)
    copies = copy_to_host(tensors)
    torch._foreach_add_(tensors, 4.0)
    assert all((copy == 3).all() for copy in copies)
    assert all(copy.is_pinned() for copy in copies)


@pytest.mark.gpu
def test_copies_take_a_piece_of_the_gpu_at_most() -> None:
    tensors = [torch.zeros(1 << 18, device="cuda") for _ in range(64)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    copy_to_host(tensors)
    assert torch.cuda.max_memory_allocated() - before <= TRANSFER_BYTES
