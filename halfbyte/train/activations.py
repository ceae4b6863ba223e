"""Whether to keep activations for the backward, to put them away, or to compute them again.

Keeping is faster by the forward pass that recomputing costs (28% of a step's arithmetic). What it takes is known for
fused blocks, which have policies between all and nothing, see `halfbyte.nn.decoder_block`: from the fastest, everything
kept; gate and up computed again; attention's input put away into host memory; the block computed again. Neighbours on
this ladder may share a model, the later blocks keeping more, and the plan is the first such mix that fits, from the
fastest. No formula knows what other architectures keep; there it is measured: a forward of a few tokens counts the
bytes that autograd keeps, which grow in proportion to tokens. The micro-batch at hand decides.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from halfbyte.models.fused_layers import (
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
    device = compute_device_of(model)
    needed = measure_kept_bytes(model, loss_path) / PROBE_TOKENS * num_tokens * TEMPORARY_SHARE
    usable = free_bytes(device) * USABLE_SHARE
    on = needed > usable
    return on, (
        f"gradient checkpointing: {'on' if on else 'off'}; keeping all activations of {num_tokens} tokens takes about "
        f"{needed / 2**30:.1f} GiB, {usable / 2**30:.1f} GiB are free for it"
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
    device = compute_device_of(model)
    itemsize = compute_dtype_of(model).itemsize
    kept = {policy: kept_bytes_per_token(model, policy, itemsize=itemsize) for policy in POLICY_TEXTS}
    passing = passing_bytes_per_token(model, itemsize=itemsize)
    usable = free_bytes(device) * USABLE_SHARE
    usable_on_host = free_bytes(torch.device("cpu")) * USABLE_SHARE / PIECES_SHARE
    room = KeptNumbers(int(usable / UNFILLED_SHARE / num_tokens) - passing, int(usable_on_host / num_tokens))
    policies = plan_policies(kept, room, ladder=_choose_ladder(device, wanted))
    set_policy(model, policies)
    taken = [kept[policy][index] for index, policy in enumerate(policies)]
    needed = (sum(one.device for one in taken) + bytes_in_flight(taken) + passing) * num_tokens * UNFILLED_SHARE
    on_host = sum(one.host for one in taken) * num_tokens
    return (
        f"activations: {describe_policies(policies)}{', as set' if wanted == 'offload' else ''}; with {num_tokens} "
        f"tokens that takes about {needed / 2**30:.1f} GiB"
        + (f" and {on_host / 2**30:.1f} GiB of host memory" if on_host else "")
        + f", {usable / 2**30:.1f} GiB are free for it"
    )


def _choose_ladder(device: torch.device, wanted: Checkpointing) -> tuple[Policy, ...]:
    if wanted == "offload":
        return ("offload", "block")
    return CPU_LADDER if device.type == "cpu" else GPU_LADDER


def measure_kept_bytes(model: PreTrainedModel, loss_path: LossPath) -> int:
    """Return the bytes that autograd keeps of a forward of PROBE_TOKENS tokens, the model's own tensors left out."""
    device = compute_device_of(model)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(PROBE_TOKENS, device=device).remainder(vocabulary)[None]
    labels = ids.roll(-1)
    labels[:, -1] = IGNORE_INDEX
    devices = [device] if device.type == "cuda" else []
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept)
    # Dropout draws random numbers; the run is to begin with those of its seed.
    with train_mode(model), torch.random.fork_rng(devices), hooks:
        loss: Any = loss_path({"input_ids": ids, "labels": labels})
    # The graph holds what was counted until here: an address freed early would be counted once for two tensors.
    del loss
    return sum(kept.values())
