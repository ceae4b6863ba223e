"""What to do when memory runs out in the middle of a run: take the next cheaper way, and do the step again.

Ways, from what costs least time. Each gives the same gradients as the one before:

    gate and up are computed again
    activations are put away into host memory (on a GPU, where the host has room)
    blocks are computed again from their input
    4-bit weights visit from host memory (on a GPU)

A model without fused blocks has one: its layers are computed again.

A step that ran out half way has added part of its gradients. It is begun anew: gradients are dropped, random numbers
set back, and all micro-batches that it had so far computed again, so that nothing is lost, skipped or in another order.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.device import free_bytes
from halfbyte.distributed import ALONE
from halfbyte.errors import PlanError
from halfbyte.memory.activation_policy import GPU_LADDER, POLICY_TEXTS, Policy
from halfbyte.models.card_split import cards_of, is_divided
from halfbyte.models.fused_layers import iter_fused_layers, kept_bytes_per_token, set_policy
from halfbyte.models.modes import checkpoint_layers_
from halfbyte.models.packed_inputs import compute_dtype_of
from halfbyte.models.streaming import is_streamed, stream_blocks_
from halfbyte.nn.linear import Linear4bit
from halfbyte.train.activations import PIECES_SHARE, USABLE_SHARE
from halfbyte.train.micro_batch import MicroBatches

Watch = Callable[[torch.Tensor], None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """A micro-batch and what it is run with."""

    batch: Mapping[str, Any]
    num_items: float | None
    seed: int
    factor: torch.Tensor | None
    watch: Watch
    is_last: bool


class Relief:
    """Runs the micro-batches of a training, and finds a way where memory runs out.

    Args:
        micro_batches: Computes them.
        num_tokens: Of the largest.
        tell: Is told what was changed.
    """

    def __init__(self, micro_batches: MicroBatches, *, num_tokens: int, tell: Callable[[str], None]) -> None:
        self.micro_batches, self.num_tokens, self.tell = micro_batches, num_tokens, tell
        self.device = micro_batches.device
        self._cards = " or ".join(map(str, cards_of(micro_batches.model, self.device)))
        self._step: list[_Run] = []

    def close_step(self) -> None:
        """Forget the micro-batches of a step whose gradients are complete."""
        self._step.clear()

    def run(
        self,
        batch: Mapping[str, Any],
        *,
        num_items: float | None,
        seed: int,
        factor: torch.Tensor | None,
        watch: Watch,
        is_last: bool = False,
        again: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch, and return its loss; see `MicroBatches.run`.

        Args:
            batch: As the loader gives it.
            num_items: Trained tokens of the whole step.
            seed: Decides what is drawn at random, when it is begun anew too.
            factor: Of the loss before its backward.
            watch: Is shown the loss.
            is_last: Of the step.
            again: Is called before the step is begun anew.

        Raises:
            PlanError: Memory has run out, and no way is left.
        """
        self._step.append(_Run(batch, num_items, seed, factor, watch, is_last))
        loss = self._try(self._step[-1:])
        while loss is None:
            self._relieve()
            again()
            loss = self._try(self._step)
        return loss

    def rehearse(self, batch: Mapping[str, Any]) -> None:
        """Compute a micro-batch for its memory alone: of batches of different sizes the largest, before all others."""
        self.run(batch, num_items=batch["num_trained"], seed=0, factor=None, watch=lambda loss: None)
        self._step.clear()
        self.micro_batches.begin_anew()

    def _try(self, runs: Sequence[_Run]) -> torch.Tensor | None:
        """Return the loss of the last of some micro-batches, or None where memory runs out."""
        try:
            losses = [
                self.micro_batches.run(
                    one.batch,
                    num_items=one.num_items,
                    seed=one.seed,
                    factor=one.factor,
                    watch=one.watch,
                    is_last=one.is_last,
                )
                for one in runs
            ]
        except torch.OutOfMemoryError:
            # What the traceback holds is free only after this block.
            return None
        return losses[-1]

    def _relieve(self) -> None:
        model = self.micro_batches.model
        self.micro_batches.release()
        self.micro_batches.begin_anew()
        release_memory(self.device)
        change = relieve_(model, self.device, num_tokens=self.num_tokens)
        if change is None:
            raise PlanError(
                f"out of memory on {self._cards} with {self.num_tokens} tokens a micro-batch, and no cheaper way is "
                "left; train with a smaller train.per_device_train_batch_size or data.max_length"
            )
        self.tell(f"out of memory on {self._cards}: from now on {change}; the step is done again")


def relieve_(model: PreTrainedModel, device: torch.device, *, num_tokens: int) -> str | None:
    """Take the next cheaper way and say which, or return None where there is none.

    Args:
        model: Being trained; its graphs have been released.
        device: Where it computes.
        num_tokens: Of the largest micro-batch.
    """
    layers = list(iter_fused_layers(model))
    if not layers:
        return _checkpoint_(model)
    policies = [layer.halfbyte_binding.policy for layer in layers]
    cheapest = _next_policy(model, policies, device, num_tokens)
    if cheapest is not None:
        rank = GPU_LADDER.index(cheapest)
        changed = sum(GPU_LADDER.index(one) < rank for one in policies)
        set_policy(model, [one if GPU_LADDER.index(one) > rank else cheapest for one in policies])
        blocks = "every block" if changed == len(policies) else f"{changed} more blocks"
        return f"activations of {blocks} are {POLICY_TEXTS[cheapest]}"
    has_4bit = any(isinstance(module, Linear4bit) for module in model.modules())
    if device.type == "cuda" and has_4bit and not is_streamed(model) and not is_divided(model):
        # Other ranks may have room, and are not here: this one's copy is its own.
        stream_blocks_(model, len(layers), device=device, world=ALONE)
        return "4-bit weights live in host memory and visit the device"
    return None


def release_memory(device: torch.device) -> None:
    """Give what nobody refers to any more back to the allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _next_policy(
    model: PreTrainedModel, policies: list[Policy], device: torch.device, num_tokens: int
) -> Policy | None:
    """Return the policy that keeps less than the one that keeps most, if there is one."""
    first = min(GPU_LADDER.index(policy) for policy in policies)
    for policy in GPU_LADDER[first + 1 :]:
        if policy == "offload" and not (device.type == "cuda" and _host_has_room(model, num_tokens)):
            continue
        # What is put away leaves less on the device than the inputs of all blocks.
        if policy == "block" and "offload" in policies:
            continue
        return policy
    return None


def _host_has_room(model: PreTrainedModel, num_tokens: int) -> bool:
    kept = kept_bytes_per_token(model, "offload", itemsize=compute_dtype_of(model).itemsize)
    needed = sum(one.host for one in kept) * num_tokens * PIECES_SHARE
    return needed < free_bytes(torch.device("cpu")) * USABLE_SHARE


def _checkpoint_(model: PreTrainedModel) -> str | None:
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if is_on or not model.supports_gradient_checkpointing:
        return None
    checkpoint_layers_(model)
    return "activations of every layer are computed again"
