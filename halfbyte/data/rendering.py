"""Many examples rendered on all cores: batches of them, each by one of several processes, in the order they came in.

Two thirds of the work is a template's program, which runs in Python, so threads do not help. The processes are forked:
they find examples and tokenizer in the memory that they share with this one, and only tokens come back. What comes back
is the same, and in the same order, whatever the number of processes, and an error is that of the first example that has
one. A process that dies (the system takes one when memory runs out) ends no run: this one renders what is left itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import numpy.typing as npt

from halfbyte.data.examples import Example, TokenizedExample
from halfbyte.data.render import Renderer
from halfbyte.distributed import num_ranks

# Enough for the tokenizer to use all cores where it does, few enough that the offsets of a batch stay small.
BATCH_EXAMPLES = 1024
# Below, forking costs more than it gives.
MIN_BATCHES_TO_SHARE = 4
# Of each process: one at work, one waiting.
_BATCHES_IN_FLIGHT = 2

Rendered = tuple[Sequence[Example], list[list[TokenizedExample]]]


def iter_rendered(
    examples: Sequence[Example], renderer: Renderer, *, num_processes: int | None = None
) -> Iterator[Rendered]:
    """Yield batches of examples with the tokens of each, in order.

    Args:
        examples: What to render.
        renderer: How; it counts what all processes did.
        num_processes: That share the work; None for as many as this rank has cores, where there is enough of it.

    Raises:
        DataError: As in `Renderer.render_batch`.
    """
    starts = list(range(0, len(examples), BATCH_EXAMPLES))
    if not starts:
        return
    # The first is rendered here: what is found out about the template is then known to all.
    yield _render_here(examples, renderer, starts[0])
    done = 1
    if num_processes is None:
        num_processes = _num_cores() if len(starts) >= MIN_BATCHES_TO_SHARE else 1
    if num_processes > 1 and sys.platform == "linux":
        try:
            for made in _iter_shared(examples, renderer, starts[1:], num_processes):
                yield made
                done += 1
        except (BrokenProcessPool, OSError) as error:
            renderer.note(f"processes that rendered the examples have failed ({error}); one went on alone")
    for start in starts[done:]:
        yield _render_here(examples, renderer, start)


def _render_here(examples: Sequence[Example], renderer: Renderer, start: int) -> Rendered:
    batch = examples[start : start + BATCH_EXAMPLES]
    return batch, renderer.render_batch(batch)


def _iter_shared(
    examples: Sequence[Example], renderer: Renderer, starts: Sequence[int], num_processes: int
) -> Iterator[Rendered]:
    executor = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(examples, renderer)
    )
    remaining = iter(starts)
    waiting: deque[tuple[int, Future[_Tokens]]] = deque()

    def submit(count: int) -> None:
        waiting.extend((start, _submit(executor, start)) for start in itertools.islice(remaining, count))

    try:
        submit(num_processes * _BATCHES_IN_FLIGHT)
        while waiting:
            start, future = waiting.popleft()
            tokens = future.result()
            submit(1)
            renderer.add_counts(tokens.counts)
            batch = examples[start : start + BATCH_EXAMPLES]
            yield batch, tokens.split(batch)
    finally:
        executor.shutdown(cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, start: int) -> Future[_Tokens]:
    with warnings.catch_warnings():
        # Python warns of forking beside threads, whose locks stay locked; a child here takes none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        return executor.submit(_render_inherited, start)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """The tokens of a batch of examples in one piece, which is sent faster than thousands of arrays."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    lengths: list[list[int]]
    """Of the texts of each example."""
    counts: Counter[str]

    @classmethod
    def join(cls, rendered: list[list[TokenizedExample]], counts: Counter[str]) -> _Tokens:
        texts = [text for made in rendered for text in made]
        return cls(
            np.concatenate([text.input_ids for text in texts] or [np.zeros(0, np.int32)]),
            np.concatenate([text.loss_mask for text in texts] or [np.zeros(0, np.bool_)]),
            [[len(text) for text in made] for made in rendered],
            counts,
        )

    def split(self, batch: Sequence[Example]) -> list[list[TokenizedExample]]:
        rendered: list[list[TokenizedExample]] = []
        end = 0
        for example, lengths in zip(batch, self.lengths, strict=True):
            made = []
            for length in lengths:
                start, end = end, end + length
                made.append(TokenizedExample(self.input_ids[start:end], self.loss_mask[start:end], example.origin))
            rendered.append(made)
        return rendered


_inherited: tuple[Sequence[Example], Renderer] | None = None


def _inherit(examples: Sequence[Example], renderer: Renderer) -> None:
    """Take over what the parent had; leave Ctrl-C, which reaches every process of a terminal, to the parent."""
    global _inherited
    _inherited = examples, renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _render_inherited(start: int) -> _Tokens:
    assert _inherited is not None, "a process of the pool"
    examples, renderer = _inherited
    renderer.forget_counts()
    _, rendered = _render_here(examples, renderer, start)
    return _Tokens.join(rendered, renderer.counts)


def _num_cores() -> int:
    """Return the cores that this process may use; those of a machine are shared by its ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // num_ranks(), 1)
