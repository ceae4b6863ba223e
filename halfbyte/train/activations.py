"""Whether to keep activations for the backward, to put them away, or to compute them again.

Keeping is faster by the forward pass that recomputing costs (28% of a step's arithmetic). What it takes is known for
fused blocks, which have policies between all and nothing, see `halfbyte.nn.decoder_block`: from the fastest, everything
kept; gate and up computed again; attention's input put away into host memory; the block computed again. Neighbours on
this ladder may share a model, the later blocks keeping more, and the plan is the first such mix that fits, from the
fastest. No formula knows what other architectures keep; there it is measured: a forward of a few tokens counts the
bytes that autograd keeps, which grow in proportion to tokens. The micro-batch at hand decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from halfbyte.data.packing import IGNORE_INDEX
from halfbyte.device import free_bytes
from halfbyte.memory.activation_policy import (
    CPU_LADDER,
    GPU_LADDER,
    POLICY_TEXTS,
    KeptNumbers,
    Policy,
    bytes_in_flight,
    describe_policies,
    plan_policies,
)
from halfbyte.models.card_split import cards_of
from halfbyte.models.fused_layers import (
    fused_layers_by_card,
    kept_bytes_per_token,
    offload_of,
    passing_bytes_per_token,
    set_policy,
)
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.modes import train_mode
from halfbyte.models.packed_inputs import compute_dtype_of
from halfbyte.train.loss import LossPath

Checkpointing = bool | Literal["auto", "offload"]
PROBE_TOKENS = 64
# Gradients and temporaries live beside what is kept, and another program may want memory too.
TEMPORARY_SHARE = 1.3
USABLE_SHARE = 0.8
# The same where temporaries are known: what the allocator cannot fill.
UNFILLED_SHARE = 1.1
# Pinned memory comes in pieces.
PIECES_SHARE = 17 / 16


def choose_checkpointing(
    model: PreTrainedModel, loss_path: LossPath, *, wanted: Checkpointing, num_tokens: int
) -> tuple[bool, str]:
    """Say whether activations are computed again in the backward, and why.

    Args:
        model: In the form in which it is trained.
        loss_path: How its loss is computed.
        wanted: True or False decides; "auto" measures; "offload", which fused blocks alone can do, is taken for True.
        num_tokens: Tokens of the largest micro-batch.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return True, "gradient checkpointing: on, as the model has it"
    if wanted == "offload":
        return True, "gradient checkpointing: on, because only fused blocks can put activations away"
    if wanted != "auto":
        return wanted, f"gradient checkpointing: {'on' if wanted else 'off'}, as set"
    kept = measure_kept_bytes(model, loss_path)
    needed = {card: kept_bytes / PROBE_TOKENS * num_tokens * TEMPORARY_SHARE for card, kept_bytes in kept.items()}
    usable = {card: free_bytes(card) * USABLE_SHARE for card in kept}
    on = any(needed[card] > usable[card] for card in kept)
    takes = [
        f"{needed[card] / 2**30:.1f} GiB{f' on {card}' if len(kept) > 1 else ''}, {usable[card] / 2**30:.1f} GiB are "
        "free for it"
        for card in kept
    ]
    return on, (
        f"gradient checkpointing: {'on' if on else 'off'}; keeping all activations of {num_tokens} tokens takes about "
        f"{'; '.join(takes)}"
    )


def choose_policy_(
    model: PreTrainedModel,
    *,
    wanted: Checkpointing,
    num_tokens: int,
    planned: Sequence[Policy] | None = None,
) -> str:
    """Set what the fused blocks of a model keep, and say what and why.

    Args:
        model: With fused layers; library checkpointing that is on becomes the policy that recomputes blocks.
        wanted: False keeps everything, True recomputes every block, "offload" puts away as much as fits into host
            memory, "auto" takes the fastest that fits.
        num_tokens: Tokens of the largest micro-batch.
        planned: What a plan has chosen for each block.
    """
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    if checkpointed or isinstance(wanted, bool):
        policy: Policy = "block" if checkpointed or wanted else "keep"
        set_policy(model, policy)
        return f"activations: {POLICY_TEXTS[policy]}, as {'the model has it' if checkpointed else 'set'}"
    if planned is not None:
        set_policy(model, planned)
        return f"activations: {describe_policies(planned)}, as planned"
    # What an earlier choice has pinned is free for this one.
    offload_of(model).release()
    usable_on_host = free_bytes(torch.device("cpu")) * USABLE_SHARE / PIECES_SHARE
    itemsize = compute_dtype_of(model).itemsize
    kept = {policy: kept_bytes_per_token(model, policy, itemsize=itemsize) for policy in POLICY_TEXTS}
    passing = passing_bytes_per_token(model, itemsize=itemsize)
    numbers_by_card = fused_layers_by_card(model)
    policies: dict[int, Policy] = {}
    notes = []
    for card, numbers in numbers_by_card.items():
        kept_here = {policy: [of_all[number] for number in numbers] for policy, of_all in kept.items()}
        chosen = _choose_on_card(card, kept_here, passing, wanted, num_tokens, usable_on_host)
        policies |= dict(zip(numbers, chosen.policies, strict=True))
        usable_on_host -= chosen.host_bytes
        notes.append(f"on {card} {chosen.note}" if len(numbers_by_card) > 1 else chosen.note)
    set_policy(model, [policies[number] for number in sorted(policies)])
    return f"activations: {'; '.join(notes)}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Chosen:
    """Policies of the blocks on one device."""

    policies: list[Policy]
    host_bytes: int
    note: str


def _choose_on_card(
    card: torch.device,
    kept: Mapping[Policy, Sequence[KeptNumbers]],
    passing: int,
    wanted: Checkpointing,
    num_tokens: int,
    usable_on_host: float,
) -> _Chosen:
    usable = free_bytes(card) * USABLE_SHARE
    room = KeptNumbers(int(usable / UNFILLED_SHARE / num_tokens) - passing, int(usable_on_host / num_tokens))
    policies = plan_policies(kept, room, ladder=_choose_ladder(card, wanted))
    taken = [kept[policy][index] for index, policy in enumerate(policies)]
    needed = (sum(one.device for one in taken) + bytes_in_flight(taken) + passing) * num_tokens * UNFILLED_SHARE
    on_host = sum(one.host for one in taken) * num_tokens
    note = (
        f"{describe_policies(policies)}{', as set' if wanted == 'offload' else ''}; with {num_tokens} "
        f"tokens that takes about {needed / 2**30:.1f} GiB"
        + (f" and {on_host / 2**30:.1f} GiB of host memory" if on_host else "")
        + f", {usable / 2**30:.1f} GiB are free for it"
    )
    return _Chosen(policies, on_host, note)


def _choose_ladder(device: torch.device, wanted: Checkpointing) -> tuple[Policy, ...]:
    if wanted == "offload":
        return ("offload", "block")
    return CPU_LADDER if device.type == "cpu" else GPU_LADDER


def measure_kept_bytes(model: PreTrainedModel, loss_path: LossPath) -> dict[torch.device, int]:
    """Return the bytes that autograd keeps of a forward of PROBE_TOKENS tokens, by device.

    The model's own tensors are left out.
    """
    device = compute_device_of(model)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[tuple[torch.device, int], int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[tensor.device, storage.data_ptr()] = storage.nbytes()
        return tensor

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(PROBE_TOKENS, device=device).remainder(vocabulary)[None]
    labels = ids.roll(-1)
    labels[:, -1] = IGNORE_INDEX
    cards = cards_of(model, device)
    devices = [card for card in cards if card.type == "cuda"]
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept)
    # Dropout draws random numbers; the run is to begin with those of its seed.
    with train_mode(model), torch.random.fork_rng(devices), hooks:
        loss: Any = loss_path({"input_ids": ids, "labels": labels})
    # The graph holds what was counted until here: an address freed early would be counted once for two tensors.
    del loss
    return {card: sum(size for (place, _), size in kept.items() if place == card) for card in cards}
