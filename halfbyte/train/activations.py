"""Whether to keep activations for the backward or to compute them again.

Keeping is faster by the forward pass that recomputing costs (28% of a step's arithmetic). What it takes is known for
fused blocks, which have a policy between all and nothing too. No formula knows it for all architectures; there it is
measured: a forward of a few tokens counts the bytes that autograd keeps, which grow in proportion to tokens. The
micro-batch at hand decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from halfbyte.data.packing import IGNORE_INDEX
from halfbyte.device import available_bytes
from halfbyte.models.fused_layers import kept_bytes_per_token, set_policy
from halfbyte.models.modes import train_mode
from halfbyte.models.packed_inputs import compute_dtype_of
from halfbyte.nn.decoder_block import Policy
from halfbyte.train.loss import LossPath

PROBE_TOKENS = 64
# From the fastest, which keeps most.
POLICY_TEXTS: dict[Policy, str] = {
    "keep": "all kept",
    "mlp": "kept but for gate and up, which are computed again",
    "block": "every block computed again",
}
# Gradients and temporaries live beside what is kept, and another program may want memory too.
TEMPORARY_SHARE = 1.3
USABLE_SHARE = 0.8


def choose_checkpointing(
    model: PreTrainedModel, loss_path: LossPath, *, wanted: bool | Literal["auto"], num_tokens: int
) -> tuple[bool, str]:
    """Say whether activations are computed again in the backward, and why.

    Args:
        model: In the form in which it is trained.
        loss_path: How its loss is computed.
        wanted: True or False decides; "auto" measures.
        num_tokens: Tokens of the largest micro-batch.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return True, "gradient checkpointing: on, as the model has it"
    if wanted != "auto":
        return wanted, f"gradient checkpointing: {'on' if wanted else 'off'}, as set"
    device = next(model.parameters()).device
    needed = measure_kept_bytes(model, loss_path) / PROBE_TOKENS * num_tokens * TEMPORARY_SHARE
    usable = free_bytes(device) * USABLE_SHARE
    on = needed > usable
    return on, (
        f"gradient checkpointing: {'on' if on else 'off'}; keeping all activations of {num_tokens} tokens takes about "
        f"{needed / 2**30:.1f} GiB, {usable / 2**30:.1f} GiB are free for it"
    )


def choose_policy_(model: PreTrainedModel, *, wanted: bool | Literal["auto"], num_tokens: int) -> str:
    """Set what the fused blocks of a model keep, and say what and why.

    Args:
        model: With fused layers; library checkpointing that is on becomes the policy that recomputes blocks.
        wanted: False keeps everything, True recomputes every block, "auto" takes the fastest that fits.
        num_tokens: Tokens of the largest micro-batch.
    """
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    if checkpointed or wanted != "auto":
        policy: Policy = "block" if checkpointed or wanted else "keep"
        set_policy(model, policy)
        return f"activations: {POLICY_TEXTS[policy]}, as {'the model has it' if checkpointed else 'set'}"
    device = next(model.parameters()).device
    itemsize = compute_dtype_of(model).itemsize
    usable = free_bytes(device) * USABLE_SHARE
    needed = 0.0
    policy = "block"
    for candidate in POLICY_TEXTS:
        needed = kept_bytes_per_token(model, candidate, itemsize=itemsize) * num_tokens * TEMPORARY_SHARE
        if needed <= usable:
            policy = candidate
            break
    set_policy(model, policy)
    return (
        f"activations: {POLICY_TEXTS[policy]}; with {num_tokens} tokens that takes about {needed / 2**30:.1f} GiB, "
        f"{usable / 2**30:.1f} GiB are free for it"
    )


def measure_kept_bytes(model: PreTrainedModel, loss_path: LossPath) -> int:
    """Return the bytes that autograd keeps of a forward of PROBE_TOKENS tokens, the model's own tensors left out."""
    device = next(model.parameters()).device
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


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a process can still take on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit = _free_by_control_group()
    return available_bytes() if limit is None else min(available_bytes(), limit)


def _free_by_control_group() -> int | None:
    """Return what a container's limit leaves, None where there is no limit."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    return max(int(limit.read_text()) - int(used.read_text()), 0)
