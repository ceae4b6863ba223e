"""What is added up at once, and what a library's error is shortened to."""

from __future__ import annotations

import torch

from halfbyte.distributed.world import _buckets, shorten, stretch_of
from halfbyte.train.micro_batch import ALIGNMENT_BYTES, lay_side_by_side

SHAPES = ((16, 33), (7,), (100, 16))


def test_gradients_side_by_side_are_one_stretch() -> None:
    gradients = lay_side_by_side([torch.randn(shape) for shape in SHAPES])
    assert [tuple(gradient.shape) for gradient in gradients] == list(SHAPES)
    start = gradients[0].data_ptr()
    assert all((gradient.data_ptr() - start) % ALIGNMENT_BYTES == 0 for gradient in gradients)
    whole = stretch_of(gradients)
    assert whole is not None
    whole += 1
    assert all(bool((gradient == 1).all()) for gradient in gradients)


def test_what_lies_apart_is_no_stretch() -> None:
    assert stretch_of([torch.randn(3), torch.randn(3)]) is None
    # Most of this memory is none of theirs.
    assert stretch_of([torch.randn(100)[:10]]) is None
    mixed = lay_side_by_side([torch.randn(64), torch.randn(64).half()])
    assert [gradient.dtype for gradient in mixed] == [torch.float32, torch.float16]
    assert stretch_of(mixed) is None


def test_every_tensor_is_in_one_bucket() -> None:
    tensors = [torch.zeros(2**21) for _ in range(9)]
    buckets = list(_buckets(tensors))
    assert [id(tensor) for bucket in buckets for tensor in bucket] == [id(tensor) for tensor in tensors]
    assert [len(bucket) for bucket in buckets] == [4, 4, 1]


def test_errors_of_libraries_are_cut_to_what_happened() -> None:
    text = "[/some/where/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically caused by"
    assert shorten(RuntimeError(text)) == "Read error [127.0.0.1]:1: Connection reset by peer"
    assert shorten(RuntimeError()) == "RuntimeError"
