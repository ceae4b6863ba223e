"""Batches: boundaries, positions and labels of packed rows agree with the unpacked examples."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.collate import collate_packed, collate_padded
from halfbyte.data.examples import TokenizedExample
from halfbyte.data.packing import PackedDataset
from tests.data.test_packing import BUDGET, PAD_ID, examples_lists


@given(examples=examples_lists())
def test_collate_packed_keeps_documents_apart(examples: list[TokenizedExample]) -> None:
    dataset = PackedDataset(examples, row_tokens=BUDGET, pad_id=PAD_ID, seed=1)
    rows = [dataset[index] for index in range(len(dataset))]
    batch = collate_packed(rows)
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (len(rows), BUDGET)
        assert batch[name].dtype == torch.int64
    bounds = batch["cu_seq_lens"]
    assert bounds.dtype == torch.int32
    assert (bounds[0], bounds[-1]) == (0, len(rows) * BUDGET)
    lengths = bounds.diff()
    assert (lengths > 0).all()
    assert type(batch["max_seq_len"]) is int
    assert batch["max_seq_len"] == lengths.max()
    expected_positions = torch.cat([torch.arange(int(length)) for length in lengths])
    assert torch.equal(batch["position_ids"].flatten(), expected_positions)
    # A label is the next token of the same document, so never one across a boundary.
    flat_ids, flat_labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    learned = (flat_labels != -100).nonzero().flatten()
    assert torch.equal(flat_labels[learned], flat_ids[learned + 1])
    assert not set((bounds[1:] - 1).tolist()) & set(learned.tolist())
    assert len(learned) == sum(example.num_trained_tokens for example in examples)


@given(examples=examples_lists(), multiple_of=st.sampled_from([1, 8]))
def test_collate_padded_holds_the_examples_as_they_are(examples: list[TokenizedExample], multiple_of: int) -> None:
    batch = collate_padded(examples, PAD_ID, multiple_of=multiple_of)
    padded = batch["input_ids"].shape[1]
    assert padded % multiple_of == 0
    assert padded - max(map(len, examples)) < multiple_of
    for row, example in enumerate(examples):
        length = len(example)
        assert batch["input_ids"][row, :length].tolist() == example.input_ids.tolist()
        assert batch["labels"][row, :length].tolist() == example.labels().tolist()
        assert (batch["input_ids"][row, length:] == PAD_ID).all()
        assert (batch["labels"][row, length:] == -100).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (padded - length)
        assert batch["position_ids"][row].tolist() == list(range(padded))


@given(examples=examples_lists())
def test_collate_packed_learns_what_collate_padded_learns(examples: list[TokenizedExample]) -> None:
    dataset = PackedDataset(examples, row_tokens=BUDGET, pad_id=PAD_ID, seed=1)
    packed = collate_packed([dataset[index] for index in range(len(dataset))])
    padded = collate_padded(examples, PAD_ID)

    def targets(batch: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
        columns = (batch["input_ids"], batch["position_ids"], batch["labels"])
        rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
        return sorted(row for row in rows if row[2] != -100)

    assert targets(packed) == targets(padded)
