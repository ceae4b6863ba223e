"""What the trainer is asked for beyond transformers' arguments."""

from __future__ import annotations

import dataclasses

from halfbyte.memory.activation_policy import Policy
from halfbyte.nn import LoraSpec
from halfbyte.train.bad_steps import OnBadStep


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainerOptions:
    """What this trainer asks for beyond transformers' arguments."""

    row_tokens: int | None = None
    """Pack examples into rows of this many tokens; None pads each batch to its longest."""
    base_model: str | None = None
    """Name or folder of the base model, written into the adapter's files; None takes the model's own."""
    base_fingerprint: str | None = None
    """Of the base model (`halfbyte.models.fingerprint`), which a run is not gone on with another of; None asks not."""
    lora: LoraSpec | None = None
    """How the adapters were attached, written likewise; None reads it off the model."""
    fused: bool = True
    """Let fused blocks compute the decoder layers, where all of them fit."""
    cuda_graphs: bool = True
    """On a GPU, launch the kernels of a micro-batch through fused blocks as one graph."""
    fp8: bool = False
    """Have fused blocks multiply frozen weights in fp8; refused where that cannot be."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of lora_B over that of everything else."""
    policies: tuple[Policy, ...] | None = None
    """What each fused block keeps for its backward, as planned; None decides by what is free."""
    on_bad_step: OnBadStep = "stop"
    """What to do with a step whose loss or gradient is not finite."""
    loss_spike: float | None = None
    """A loss that is so many times the running mean is bad too."""
    config_text: str | None = None
    """Of run.yaml, kept in every checkpoint."""


DEFAULT_OPTIONS = TrainerOptions()
