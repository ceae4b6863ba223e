"""What blocks keep for their backward: how many numbers it takes, and which mix of policies fits.

From the fastest: everything kept; gate and up computed again; what attention needs put away into host memory; the
block computed again from its input. See `halfbyte.nn.decoder_block` for what each of them is.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from halfbyte.memory.model_shape import ModelShape

Policy = Literal["keep", "mlp", "offload", "block"]
# From the fastest, which keeps most. On a CPU there is one memory, and no use in putting away.
GPU_LADDER: tuple[Policy, ...] = ("keep", "mlp", "offload", "block")
CPU_LADDER: tuple[Policy, ...] = ("keep", "mlp", "block")
POLICY_TEXTS: dict[Policy, str] = {
    "keep": "all kept",
    "mlp": "kept but for gate and up, which are computed again",
    "offload": "in host memory, but for what follows from attention's input, which is computed again",
    "block": "computed again from the block's input",
}


class KeptNumbers(NamedTuple):
    """How many numbers a token a block keeps for its backward, those of ranks left out."""

    device: int
    host: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockSizes:
    """Numbers a token that the parts of a fused block take and give."""

    width: int
    qkv_width: int
    attention_width: int
    """What attention returns."""
    normed_width: int
    """Queries and keys, if they are normed, else 0."""
    ff_width: int

    @classmethod
    def of(cls, shape: ModelShape) -> BlockSizes:
        """Return the sizes of the blocks of a model."""
        return cls(
            width=shape.width,
            qkv_width=shape.qkv_width,
            attention_width=shape.attention_width,
            normed_width=(shape.query_heads + shape.key_heads) * shape.head_width if shape.has_head_norms else 0,
            ff_width=shape.ff_width,
        )

    def kept_numbers(self, policy: Policy) -> KeptNumbers:
        """Return what a block keeps. Beside it, offloading has the tensors of two blocks on the device at a time."""
        if policy == "block":
            return KeptNumbers(device=self.width, host=0)
        if policy == "offload":
            return KeptNumbers(device=0, host=self.width + self.qkv_width)
        heads = self.qkv_width + self.attention_width + self.normed_width
        gate_up = 2 * self.ff_width if policy == "keep" else 0
        return KeptNumbers(device=2 * self.width + heads + gate_up, host=0)

    @property
    def passing_numbers(self) -> int:
        """How many numbers a token are alive while a block is computed, beside what blocks keep; an upper bound.

        A group's input or its gradient, and the adapter's share of that; h, y, and the gradients of x, h and y.
        """
        return self.qkv_width + 2 * self.ff_width + 2 * self.ff_width + 5 * self.width

    def backward_numbers(self, policy: Policy, *, attention_scratch: int) -> int:
        """Return the largest number a token that is alive in a block's backward, beside what is kept or in flight.

        The three moments that can be largest: the MLP's gradient, attention's own backward, and its gradients joined.

        Args:
            policy: Of the block.
            attention_scratch: Numbers a token that attention's backward takes for itself.
        """
        width, again = self.width, self._computed_again(policy)
        gate_up = 2 * self.ff_width
        # After the MLP's gradient, h and gate and up are free; gradients of h and y have come.
        before = again + 2 * width - (width + gate_up)
        attention = before + self.qkv_width + attention_scratch
        joined = before + 2 * self.qkv_width + width
        return max(again + 2 * width, attention, joined, 0)

    def _computed_again(self, policy: Policy) -> int:
        if policy == "keep":
            return 0
        gate_up = 2 * self.ff_width
        if policy == "mlp":
            return gate_up
        attention = self.width + self.attention_width + self.normed_width + gate_up
        return attention + (self.qkv_width if policy == "block" else 0)


def plan_policies(
    kept: Mapping[Policy, Sequence[KeptNumbers]], room: KeptNumbers, *, ladder: Sequence[Policy]
) -> list[Policy]:
    """Return the fastest policy for each block that fits or, where nothing fits, what takes least of the device.

    Blocks take one of two neighbours on the ladder: the later ones, whose backward comes first, the one that keeps
    more. The last blocks' tensors live shortest, and those that are put away have the longest time to come back.

    Args:
        kept: Bytes a token that each block keeps on the device and on the host, by policy.
        room: The same that there is room for.
        ladder: From the policy that keeps most on the device.
    """
    num_blocks = len(kept[ladder[-1]])

    def mix(more: Policy, less: Policy, room: KeptNumbers) -> list[Policy] | None:
        for count in range(num_blocks, 0, -1):
            policies = [less] * (num_blocks - count) + [more] * count
            if _fits(policies, kept, room):
                return policies
        return None

    for more, less in itertools.pairwise(ladder):
        if (policies := mix(more, less, room)) is not None:
            return policies
    anywhere = KeptNumbers(device=sys.maxsize, host=room.host)
    least = mix("offload", "block", anywhere) if "offload" in ladder else None
    return least or [ladder[-1]] * num_blocks


def bytes_in_flight(taken: Sequence[KeptNumbers]) -> int:
    """Return what is on the device of that which is put away: the tensors of two blocks."""
    return sum(sorted((one.host for one in taken), reverse=True)[:2])


def describe_policies(policies: Sequence[Policy], words: Mapping[Policy, str] = POLICY_TEXTS) -> str:
    """Return what blocks keep, for people."""
    runs = [(words[policy], len(list(group))) for policy, group in itertools.groupby(policies)]
    if len(runs) == 1:
        return runs[0][0]
    (first, count), (last, rest) = runs
    return f"of the first {count} blocks {first}, of the last {rest} {last}"


def _fits(policies: Sequence[Policy], kept: Mapping[Policy, Sequence[KeptNumbers]], room: KeptNumbers) -> bool:
    taken = [kept[policy][index] for index, policy in enumerate(policies)]
    device = sum(one.device for one in taken) + bytes_in_flight(taken)
    return device <= room.device and sum(one.host for one in taken) <= room.host
