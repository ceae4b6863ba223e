"""Which way to run is the fastest that fits: the search over everything a plan may choose.

Every candidate (rows of a micro-batch, what blocks keep, blocks that visit, where the embedding lives) has a time, by
`cost_model`, and takes bytes, by `ledger`; both are arithmetic of microseconds. A coarse grid of them is computed once.
The fastest that fits the budget is refined block by block; its neighbours, the next that takes less and the next
that is faster, are what a person who is not content wants to know.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from halfbyte.errors import PlanError
from halfbyte.memory.activation_policy import CPU_LADDER, GPU_LADDER, Policy
from halfbyte.memory.cards import Card
from halfbyte.memory.cost_model import CostModel, StepTime
from halfbyte.memory.ledger import Ledger, LedgerMaker
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.run_shape import Choice, Home, RunShape, runs_of

# Points of the coarse grid along blocks.
GRID_POINTS = 17
# What a plan may err by, and must not use: a share, and what the allocator's steps of 20 MiB come to on small cards.
MARGIN, MARGIN_BYTES = 0.02, 64 * 2**20
# Differences that are worth being told: a cheaper plan takes so much less, a faster one so much less time.
LESS_BYTES, LESS_SECONDS = 0.9, 0.95
# What lives on the device cannot be late: at equal time nothing visits. Shares of the time, the first for all blocks.
VISITING_PENALTY, HOST_EMBEDDING_PENALTY = 0.01, 0.001
# Memory is not taken for nothing: all of it has to bring so much, as a share of the time.
MEMORY_PENALTY = 0.005


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a run may take."""

    device_bytes: int
    """Of the card, the CUDA context included; without a GPU nothing."""
    host_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pins:
    """What a person has chosen already; None leaves it to the plan."""

    rows: int | None = None
    policy: Policy | Literal["offloaded"] | None = None
    """Of every block; "offloaded" is put away as far as host memory goes."""
    streamed_blocks: int | None = None
    embedding_on_host: bool | None = None
    sharded: bool | None = None
    """Whether blocks that visit are divided among the cards of a host."""


NO_PINS = Pins()


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A choice with what it takes."""

    choice: Choice
    ledger: Ledger
    time: StepTime

    @property
    def taken_bytes(self) -> int:
        """What it takes of the device or, without a GPU, of the host."""
        return self.ledger.device_bytes or self.ledger.host_bytes

    def cost(self, budget: Budget) -> float:
        """Return the seconds of a step, and a little more for what may be late and for the memory it takes."""
        visits = VISITING_PENALTY * self.choice.streamed_blocks / len(self.choice.policy_of_blocks)
        memory = MEMORY_PENALTY * self.taken_bytes / (budget.device_bytes or budget.host_bytes)
        return self.time.seconds * (1 + visits + HOST_EMBEDDING_PENALTY * self.choice.embedding_on_host + memory)

    def fits(self, budget: Budget) -> bool:
        """Say whether it does, with a margin on the device."""
        margin = max(MARGIN * budget.device_bytes, MARGIN_BYTES) if budget.device_bytes else 0
        return self.ledger.device_bytes <= budget.device_bytes - margin and self.ledger.host_bytes <= budget.host_bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """How a run is to use memory, and its neighbours."""

    shape: ModelShape
    run: RunShape
    card: Card
    budget: Budget
    best: Candidate
    """The fastest that fits or, where nothing does, what takes least."""
    fits: bool
    cheaper: Candidate | None
    """The fastest that takes noticeably less of the device."""
    faster: Candidate | None
    """The one that takes least of those that are noticeably faster, whatever the card has."""

    def tokens_per_second(self, candidate: Candidate) -> float:
        """Return the predicted speed of a candidate, of all ranks together."""
        return self.run.ranks * self.run.batch_rows * self.run.row_tokens / candidate.time.seconds


def make_plan(shape: ModelShape, run: RunShape, card: Card, budget: Budget, *, pins: Pins = NO_PINS) -> MemoryPlan:
    """Find the fastest way to run that fits.

    Args:
        shape: The model.
        run: What is asked for.
        card: Where it computes.
        budget: What it may take.
        pins: What is chosen already.
    """
    search = Search(shape, run, card, pins)
    fitting = search.fastest(budget)
    best = fitting or search.cheapest(budget)
    smaller = dataclasses.replace(budget, device_bytes=int(best.ledger.device_bytes * LESS_BYTES / (1 - MARGIN)))
    return MemoryPlan(
        shape=shape,
        run=run,
        card=card,
        budget=budget,
        best=best,
        fits=fitting is not None,
        cheaper=search.fastest(smaller) if card.is_gpu and fitting is not None else None,
        faster=search.faster_than(best, budget),
    )


class Search:
    """The candidates of one run.

    Args:
        shape: The model.
        run: What is asked for.
        card: Where it computes.
        pins: What is chosen already.
    """

    def __init__(self, shape: ModelShape, run: RunShape, card: Card, pins: Pins) -> None:
        self.shape, self.run, self.card, self.pins = shape, run, card, pins
        if pins.sharded and not run.may_divide:
            raise cannot_divide(host_ranks=run.host_ranks)
        self._ledgers = LedgerMaker(shape, run, card)
        self._costs = CostModel(self._ledgers)
        self._grid = [self.evaluate(choice) for choice in self._choices(_points(shape.layers))]

    def evaluate(self, choice: Choice) -> Candidate:
        """Return what a choice takes."""
        return Candidate(choice, self._ledgers.make(choice), self._costs.predict(choice))

    def fastest(self, budget: Budget) -> Candidate | None:
        """Return the fastest candidate that fits, or None."""
        fitting = [candidate for candidate in self._grid if candidate.fits(budget)]
        return self._refine(min(fitting, key=lambda one: one.cost(budget)), budget) if fitting else None

    def cheapest(self, budget: Budget) -> Candidate:
        """Return what takes least of the device among what host memory has room for, or of all."""
        within = [one for one in self._grid if one.ledger.host_bytes <= budget.host_bytes] or self._grid
        return min(within, key=lambda one: one.ledger.device_bytes + one.ledger.host_bytes * (not self.card.is_gpu))

    def faster_than(self, best: Candidate, budget: Budget) -> Candidate | None:
        """Return what takes least among the candidates that are noticeably faster than `best`, if any are."""
        faster = [
            one
            for one in self._grid
            if one.time.seconds < LESS_SECONDS * best.time.seconds
            and (one.ledger.host_bytes <= budget.host_bytes or not self.card.is_gpu)
        ]
        return min(faster, key=lambda one: (one.taken_bytes, one.time.seconds), default=None)

    def _refine(self, best: Candidate, budget: Budget) -> Candidate:
        """Walk block by block from a point of the grid to the best that fits around it."""
        for _ in range(2 * self.shape.layers):
            near = [self.evaluate(choice) for choice in self._neighbours(best.choice)]
            better = [one for one in near if one.fits(budget) and one.cost(budget) < best.cost(budget)]
            if not better:
                break
            best = min(better, key=lambda one: one.cost(budget))
        return best

    def _neighbours(self, choice: Choice) -> Iterator[Choice]:
        layers = self.shape.layers
        mixes = [choice.policies]
        for pair in self._pairs():
            count = _count_of(choice, pair, layers)
            if count is not None:
                mixes += [_runs(pair, one, layers) for one in (count - 1, count + 1, count + 4) if 0 <= one <= layers]
        visiting = [choice.streamed_blocks]
        if self.pins.streamed_blocks is None and choice.streamed_blocks:
            visiting += [choice.streamed_blocks - step for step in (1, 4) if choice.streamed_blocks > step]
        for policies, count in itertools.product(dict.fromkeys(mixes), visiting):
            yield dataclasses.replace(choice, policies=policies, streamed_blocks=count)

    def _choices(self, points: Sequence[int]) -> Iterator[Choice]:
        layers = self.shape.layers
        mixes = dict.fromkeys(_runs(pair, count, layers) for pair in self._pairs() for count in points)
        for rows, policies, count, on_host in itertools.product(
            self._rows(), mixes, self._visiting(points), self._embedding_places()
        ):
            for home in self._homes() if count else ("host",):
                yield Choice(rows=rows, policies=policies, streamed_blocks=count, embedding_on_host=on_host, home=home)

    def _pairs(self) -> list[tuple[Policy, Policy]]:
        """Return pairs of policies, of which the last blocks have the first."""
        pinned = self.pins.policy
        if not self.run.fused:
            # The path for any architecture keeps everything or nothing.
            pairs: list[tuple[Policy, Policy]] = [("keep", "keep"), ("block", "block")]
            return [pair for pair in pairs if pinned is None or pair[0] == ("keep" if pinned == "keep" else "block")]
        if pinned == "offloaded":
            return [("offload", "block")]
        if pinned is not None:
            return [(pinned, pinned)]
        return list(itertools.combinations(GPU_LADDER if self.card.is_gpu else CPU_LADDER, 2))

    def _rows(self) -> list[int]:
        """Return how many rows a micro-batch may have: those that divide the batch."""
        if self.pins.rows is not None:
            return [self.pins.rows]
        return [rows for rows in range(1, self.run.batch_rows + 1) if self.run.batch_rows % rows == 0]

    def _visiting(self, points: Sequence[int]) -> list[int]:
        if self.pins.streamed_blocks is not None:
            return [self.pins.streamed_blocks]
        # Fewer than two slots bring nothing: blocks visit one after the other.
        return [0, *(count for count in points[::2] if count > 2)] if self.card.is_gpu and self.run.in_4bit else [0]

    def _homes(self) -> Sequence[Home]:
        """Return where blocks that visit may live."""
        homes: list[Home] = []
        if not self.pins.sharded:
            homes += ["host", "files"] if self.run.may_spill else ["host"]
        if self.pins.sharded is not False and self.run.may_divide:
            homes.append("cards")
        return homes

    def _embedding_places(self) -> list[bool]:
        if self.shape.ties_embedding or not self.card.is_gpu or "embed_tokens" in self.run.trained_whole:
            return [False]
        return [False, True] if self.pins.embedding_on_host is None else [self.pins.embedding_on_host]


def cannot_divide(*, host_ranks: int) -> PlanError:
    """Return the error that says why blocks are not divided among the cards of a host."""
    why = "there is one rank on this host" if host_ranks == 1 else "its cards do not read each other's memory"
    return PlanError(
        f"memory.sharded: {why}, so nothing can be divided among cards; leave it out, and blocks that do not stay "
        "visit from host memory, of which all ranks share one copy"
    )


def _points(layers: int) -> list[int]:
    return sorted({round(layers * index / (GRID_POINTS - 1)) for index in range(GRID_POINTS)})


def _runs(pair: tuple[Policy, Policy], count: int, layers: int) -> tuple[tuple[Policy, int], ...]:
    more, less = pair
    return ((more, layers),) if more == less else runs_of(less, more, layers=layers, count=count)


def _count_of(choice: Choice, pair: tuple[Policy, Policy], layers: int) -> int | None:
    """Return how many blocks have the first policy of a pair, or None where others are in use."""
    more, less = pair
    if more == less or any(policy not in pair for policy, _ in choice.policies):
        return None
    return sum(count for policy, count in choice.policies if policy == more)
