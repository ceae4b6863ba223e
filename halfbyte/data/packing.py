"""Rows of a fixed number of tokens, filled with several examples that never see each other.

Why: a batch of examples padded to the longest is half padding on chat data, and every batch has another shape. Packed
rows are nearly full (over 99% on data of mixed lengths) and all of one shape.

How: best fit decreasing. Examples are taken from the longest to the shortest, each goes into the row that it fills up
best (smallest room that is enough), a new row is opened when none has room. It needs at most 11/9 of the optimal
number of rows and a constant (Johnson 1973), and with many different lengths next to none more. The rooms that occur
are bits of one integer, so the best row is found by a shift and the lowest set bit: sorting is what costs, O(n log n).

Order: the number of rows depends only on the lengths, so it is the same in every epoch. Which of several equally long
examples goes where, and the order of rows, are shuffled by (seed, epoch) and by nothing else: a resumed run continues
with the rows of the uninterrupted one.

A row ends with padding where no example fits. The padding is a document of its own, with its own positions and without
targets, so attention over it costs little and reaches nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch.utils.data

from halfbyte.data.examples import TokenizedExample
from halfbyte.data.sampler import make_order
from halfbyte.errors import DataError

IGNORE_INDEX = -100


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """Several examples in a row of fixed length.

    Args:
        input_ids: Tokens, (row tokens,).
        labels: Target of each position, already shifted: the next token of the same example, -100 where that one is not
            learned or there is none.
        position_ids: Position of each token in its example.
        lengths: Tokens of each document of the row, in order; the padding, if any, is the last.
        origins: Where each example came from; the padding has none.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    lengths: tuple[int, ...]
    origins: tuple[str, ...]


def pack_best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute examples over rows of a fixed number of tokens.

    Args:
        lengths: Tokens of each example, at least 1.
        budget: Tokens of a row.

    Returns:
        The indices of the examples in each row; each example in exactly one.

    Raises:
        DataError: An example is longer than a row.

    Example:
        Rows of 10. The 7 opens row 0 (room 3), the 6 row 1 (room 4). The 4 fills row 1, the 3 fills row 0 (both full),
        the 2 opens row 2.

        >>> pack_best_fit([3, 7, 2, 6, 4], 10)
        [[1, 0], [3, 4], [2]]
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some row has room for exactly r tokens
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if not 0 < length <= budget:
            raise DataError(f"example {index} has {length} tokens; a packed row takes 1 to {budget}.")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = budget, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            rows_by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


def make_row(examples: Sequence[TokenizedExample], *, row_tokens: int, pad_id: int) -> PackedRow:
    """Put examples into one row and fill it up.

    Args:
        examples: What the row holds, row_tokens tokens at most.
        row_tokens: Tokens of the row.
        pad_id: Token to fill with; never a target, so it may be the end token.
    """
    lengths = [len(example) for example in examples]
    num_padding = row_tokens - sum(lengths)
    assert num_padding >= 0, "the examples fit the row"
    if num_padding:
        lengths.append(num_padding)
    return PackedRow(
        input_ids=np.concatenate([example.input_ids for example in examples] + [np.full(num_padding, pad_id)]).astype(
            np.int64
        ),
        labels=np.concatenate(
            [example.labels(ignore_index=IGNORE_INDEX) for example in examples] + [np.full(num_padding, IGNORE_INDEX)]
        ),
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        lengths=tuple(lengths),
        origins=tuple(example.origin for example in examples),
    )


class PackedDataset(torch.utils.data.Dataset[PackedRow]):
    """Packed rows of one epoch, to be read in order (a sequential sampler): the order is already shuffled.

    Args:
        examples: What to pack, each of row_tokens tokens at most.
        row_tokens: Tokens of a row.
        pad_id: Token to fill rows with.
        seed: Decides, with the epoch, which rows there are and their order.
        is_shuffled: False keeps the order of packing, for evaluation.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        *,
        row_tokens: int,
        pad_id: int,
        seed: int = 0,
        is_shuffled: bool = True,
    ) -> None:
        self.examples = examples
        self.row_tokens = row_tokens
        self.pad_id = pad_id
        self.seed = seed
        self.is_shuffled = is_shuffled
        self._lengths = [len(example) for example in examples]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Pack anew for an epoch; a pure function of the seed and the epoch."""
        self.epoch = epoch
        if not self.is_shuffled:
            self._rows = pack_best_fit(self._lengths, self.row_tokens)
            return
        order = make_order(len(self.examples), seed=self.seed, epoch=epoch)
        rows = pack_best_fit([self._lengths[index] for index in order], self.row_tokens)
        row_order = make_order(len(rows), seed=self.seed, epoch=epoch)
        self._rows = [[order[index] for index in rows[row]] for row in row_order]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PackedRow:
        held = [self.examples[example] for example in self._rows[index]]
        return make_row(held, row_tokens=self.row_tokens, pad_id=self.pad_id)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are examples and not padding."""
        return sum(self._lengths) / max(len(self) * self.row_tokens, 1)
