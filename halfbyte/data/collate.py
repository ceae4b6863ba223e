"""Rows and examples become batches of tensors.

Labels are already shifted: labels[t] is the target of position t, so the loss needs no shift, and no target ever comes
from the next document. Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.data.examples import TokenizedExample
from halfbyte.data.packing import IGNORE_INDEX, PackedRow

Batch = dict[str, Any]


def collate_packed(rows: Sequence[PackedRow]) -> Batch:
    """Return a batch of packed rows.

    Args:
        rows: Rows of equal length.

    Returns:
        input_ids, labels and position_ids, (rows, tokens), int64; cu_seq_lens, (documents + 1,), int32: where each
        document starts in the flattened tokens, and the end; max_seq_len: tokens of the longest document.
    """
    lengths = [length for row in rows for length in row.lengths]
    return {
        "input_ids": torch.from_numpy(np.stack([row.input_ids for row in rows])),
        "labels": torch.from_numpy(np.stack([row.labels for row in rows])),
        "position_ids": torch.from_numpy(np.stack([row.position_ids for row in rows])),
        "cu_seq_lens": torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        "max_seq_len": max(lengths),
    }


def collate_padded(examples: Sequence[TokenizedExample], pad_id: int, *, multiple_of: int = 1) -> Batch:
    """Return a batch of examples, padded on the right to the longest.

    Args:
        examples: The examples.
        pad_id: Token to pad with; never a target and masked from attention, so it may be the end token.
        multiple_of: The padded length is a multiple of this many tokens.

    Returns:
        input_ids, labels, attention_mask (1 for tokens, 0 for padding) and position_ids, (examples, tokens), int64.
    """
    longest = max(len(example) for example in examples)
    padded_tokens = -(-longest // multiple_of) * multiple_of
    shape = (len(examples), padded_tokens)
    input_ids_BT = np.full(shape, pad_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    attention_mask_BT = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids_BT[row, : len(example)] = example.input_ids
        labels_BT[row, : len(example)] = example.labels(ignore_index=IGNORE_INDEX)
        attention_mask_BT[row, : len(example)] = 1
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "labels": torch.from_numpy(labels_BT),
        "attention_mask": torch.from_numpy(attention_mask_BT),
        "position_ids": torch.arange(padded_tokens).repeat(len(examples), 1),
    }
