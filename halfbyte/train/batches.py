"""Batches of tensors for the loop: which examples each holds, in which order, and what the loop wants to know of them.

The order is a pure function of seed and epoch (`halfbyte.data`), so the place in the data is a number: a resumed run
skips so many batches and goes on. Beside its tensors a batch carries what only the host needs: `origins` of its
examples, `num_tokens` without padding, `num_trained`, and the `document_layout` of a packed one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from halfbyte.data.collate import collate_packed, collate_padded
from halfbyte.data.examples import TokenizedExample
from halfbyte.data.packing import IGNORE_INDEX, PackedDataset, PackedRow, make_row
from halfbyte.data.sampler import LengthGroupedSampler, ShuffledSampler
from halfbyte.distributed import ALONE, World
from halfbyte.models.attention import DocumentLayout
from halfbyte.ops.cross_entropy import find_trained_tokens

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """How examples become batches."""

    pad_id: int
    row_tokens: int | None = None
    """Tokens of a packed row; None pads each batch to its longest example instead."""
    group_by_length: bool = False
    """Pad examples of like length together."""
    is_shuffled: bool = True


class EpochBatches(BatchSampler):
    """torch's batches of indices, told the epoch; of every `of` of them the one numbered `part`.

    All parts have as many batches. Where they do not come out even, the last of some hold nothing.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, drop_last: bool, source: Any, *, part: int = 0, of: int = 1
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.source, self.part, self.of = source, part, of

    def __len__(self) -> int:
        return -(-super().__len__() // self.of)

    def __iter__(self) -> Iterator[list[int]]:
        batches = super().__iter__()
        while turn := list(itertools.islice(batches, self.of)):
            yield turn[self.part] if self.part < len(turn) else []

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; transformers calls this also where it skips batches of a resumed epoch."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)


class EpochLoader(DataLoader[Any]):
    """A loader of batches that is told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch)


def build_loader(
    examples: Sequence[TokenizedExample],
    options: BatchOptions,
    *,
    batch_size: int,
    seed: int,
    world: World = ALONE,
    **loader_options: Any,
) -> EpochLoader:
    """Return a loader of collated batches.

    Args:
        examples: What to train on.
        options: How they become batches.
        batch_size: Packed rows, or padded examples, of a batch.
        seed: Decides the order, with the epoch.
        world: Whose ranks share the batches: n of them see at a time what one would see in n.
        **loader_options: For torch's DataLoader; drop_last for the last batch where it is not full.
    """
    sampler: Sampler[int]
    dataset: Dataset[Any]
    source: PackedDataset | Sampler[int]
    if options.row_tokens is not None:
        dataset = source = PackedDataset(
            examples,
            row_tokens=options.row_tokens,
            pad_id=options.pad_id,
            seed=seed,
            is_shuffled=options.is_shuffled,
        )
        sampler = SequentialSampler(dataset)
    else:
        dataset = _Examples(examples)
        sampler = source = _padded_sampler(examples, options, batch_size=batch_size, seed=seed)
    drop_last = loader_options.pop("drop_last", False)
    batches = EpochBatches(sampler, batch_size, drop_last, source, part=world.rank, of=world.size)
    # A generator of its own: torch's loaders otherwise draw from the global one, which dropout needs undisturbed.
    generator = torch.Generator().manual_seed(seed)
    if loader_options.get("num_workers"):
        loader_options["worker_init_fn"] = _ignore_interrupts
    collate = _Collate(options.pad_id, row_tokens=options.row_tokens)
    return EpochLoader(dataset, batch_sampler=batches, collate_fn=collate, generator=generator, **loader_options)


def iter_batches(
    examples: Sequence[TokenizedExample], options: BatchOptions, *, batch_size: int, world: World = ALONE
) -> Iterator[Batch]:
    """Yield batches for evaluation: every example once, in a fixed order, nothing at random; of a rank its own."""
    fixed = dataclasses.replace(options, is_shuffled=False, group_by_length=False)
    if fixed.row_tokens is None:
        examples = sorted(examples, key=len)
    loader = build_loader(examples, fixed, batch_size=batch_size, seed=0, world=world)
    for indices in loader.batch_sampler or ():
        yield loader.collate_fn([loader.dataset[index] for index in indices])


def largest_batch(examples: Sequence[TokenizedExample], options: BatchOptions, batch_size: int) -> Batch:
    """Return a padded batch than which none of these examples can give a larger one."""
    longest = sorted(examples, key=len, reverse=True)[:batch_size]
    return _Collate(options.pad_id)(longest)


def pad_id_of(tokenizer: Any) -> int:
    """Return the token to fill rows with: the pad token, or any other, since what is filled is never a target."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return int(next(token for token in ids if token is not None))


def move_batch(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`; from pinned memory without waiting.

    Where the trained tokens are is looked up here, on the host, so that the loss need not ask the device for it.
    """
    trained = batch["trained"] if "trained" in batch else find_trained_tokens(batch["labels"].flatten())
    if device.type == "cuda":
        trained = trained.pin_memory()
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in {**batch, "trained": trained}.items()
    }


def fingerprint_examples(examples: Sequence[TokenizedExample]) -> str:
    """Return a short hash of tokens and masks in order: equal for equal training data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(4, "little"))
        digest.update(example.input_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
    return digest.hexdigest()[:16]


class _Examples(Dataset[TokenizedExample]):
    def __init__(self, examples: Sequence[TokenizedExample]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.examples[index]


class _Collate:
    """Rows or examples to a batch, with what the host wants to know; none to a batch that trains nothing."""

    def __init__(self, pad_id: int, *, row_tokens: int | None = None) -> None:
        self.pad_id, self.row_tokens = pad_id, row_tokens

    def __call__(self, items: Sequence[PackedRow] | Sequence[TokenizedExample]) -> Batch:
        batch: Batch
        items = items or self._nothing()
        if isinstance(items[0], PackedRow):
            rows = [row for row in items if isinstance(row, PackedRow)]
            batch = collate_packed(rows)
            batch["document_layout"] = DocumentLayout.from_boundaries(batch["cu_seq_lens"].tolist())
            batch["origins"] = [origin for row in rows for origin in row.origins]
            # Padding, where a row has any, is its last document and has no origin.
            batch["num_tokens"] = sum(sum(row.lengths[: len(row.origins)]) for row in rows)
        else:
            examples = [example for example in items if isinstance(example, TokenizedExample)]
            batch = collate_padded(examples, self.pad_id)
            batch["origins"] = [example.origin for example in examples]
            batch["num_tokens"] = sum(map(len, examples))
        batch["num_trained"] = int((batch["labels"] != IGNORE_INDEX).sum())
        return batch

    def _nothing(self) -> Sequence[PackedRow] | Sequence[TokenizedExample]:
        if self.row_tokens is not None:
            return [make_row([], row_tokens=self.row_tokens, pad_id=self.pad_id)]
        return [TokenizedExample(np.full(2, self.pad_id, dtype=np.int32), np.zeros(2, dtype=bool), "nothing")]


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _padded_sampler(
    examples: Sequence[TokenizedExample], options: BatchOptions, *, batch_size: int, seed: int
) -> Sampler[int]:
    if options.group_by_length:
        return LengthGroupedSampler([len(example) for example in examples], batch_size=batch_size, seed=seed)
    if options.is_shuffled:
        return ShuffledSampler(len(examples), seed=seed)
    return SequentialSampler(examples)
