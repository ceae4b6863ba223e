"""What a run asks for, and what a plan may choose: the two things that bytes and seconds follow from."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from halfbyte.errors import PlanError
from halfbyte.memory.activation_policy import Policy
from halfbyte.memory.model_shape import PROJECTIONS

DEFAULT_SLOTS = 3
# Where weights live that visit a device: in host memory, in files, or divided among the cards of a host.
Home = Literal["host", "files", "cards"]
# Slabs in files that are read into pinned memory ahead of their use.
READ_BUFFERS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunShape:
    """What is asked for, and not the planner's to change."""

    row_tokens: int = 1024
    """Tokens of a row."""
    batch_rows: int = 4
    """Rows of an optimizer step; of several ranks, those of one."""
    ranks: int = 1
    """Processes that train together, each on a card of its own."""
    host_ranks: int = 1
    """Of them, those on one host, which share what visits their cards."""
    cards_reach: bool = False
    """Whether cards of a host read each other's memory."""
    peer_gbps: float = 10.0
    """Bytes a second that a rank exchanges with others when gradients are added up, in 1e9."""
    rank: int = 16
    """Of every adapter."""
    dora: bool = False
    """Whether adapters have a magnitude of each output too."""
    keeps_first: bool = False
    """Whether what adapters begin from was taken out of the base, and is kept."""
    targets: tuple[str, ...] = PROJECTIONS
    """The projections of a block that have one."""
    in_4bit: bool = True
    """Whether frozen linear weights are; if not, they take the compute dtype."""
    block_size: int = 64
    """Weights that share a scale."""
    double_quant: bool = True
    """Whether scales are kept in 8 bits."""
    compute_bytes: Literal[2, 4] = 2
    """Of a number in the dtype that products run in."""
    state_bits: Literal[8, 32] = 8
    """Of a moment of the optimizer."""
    pages_optimizer: bool = False
    """Whether its moments live in host memory."""
    drops: bool = True
    """Whether adapters drop elements of their input."""
    fp8: bool = False
    """Whether frozen weights are multiplied in fp8."""
    fused: bool = True
    """Whether fused blocks compute the layers; if not, figures are rougher."""
    expandable_segments: bool = True
    """Whether torch's allocator on a GPU may grow its segments."""
    token_rows: int = 0
    """Tokens whose rows of embedding and head are trained."""
    trained_whole: tuple[str, ...] = ()
    """Of embed_tokens and lm_head, those that are trained whole."""
    may_spill: bool = False
    """Whether weights of blocks may lie in files, for want of host memory."""

    @property
    def may_divide(self) -> bool:
        """Whether blocks can be divided among the cards of a host."""
        return self.cards_reach and self.host_ranks > 1

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(PROJECTIONS)
        if unknown:
            raise PlanError(f"a plan knows the projections {', '.join(PROJECTIONS)}; not {', '.join(sorted(unknown))}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a plan chooses."""

    rows: int
    """Rows of a micro-batch."""
    policies: tuple[tuple[Policy, int], ...]
    """Runs of blocks from the first: what each keeps, and how many."""
    streamed_blocks: int = 0
    """Blocks whose 4-bit weights do not stay on every card, evenly spread."""
    slots: int = DEFAULT_SLOTS
    """Blocks that are on the device at a time, of those."""
    embedding_on_host: bool = False
    """Whether rows of the embedding are read from host memory."""
    home: Home = "host"
    """Where the weights of those blocks live; on cards, each block on one of them, in turn."""

    @property
    def policy_of_blocks(self) -> tuple[Policy, ...]:
        """What each block keeps, in order."""
        return tuple(itertools.chain.from_iterable([policy] * count for policy, count in self.policies))


def runs_of(less: Policy, more: Policy, *, layers: int, count: int) -> tuple[tuple[Policy, int], ...]:
    """Return the runs of blocks of which the last `count` keep more."""
    runs: tuple[tuple[Policy, int], ...] = ((less, layers - count), (more, count))
    return tuple(run for run in runs if run[1])
