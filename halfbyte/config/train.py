"""Options of the training loop, under the names that transformers gives them where it has the option."""

from __future__ import annotations

import dataclasses
from typing import Literal

from halfbyte.config.option import option
from halfbyte.config.values import check_section
from halfbyte.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """The training loop"""

    num_train_epochs: float = option(3.0, above=0)
    """Times through the data; a part of an epoch is fine."""
    max_steps: int = option(-1, minimum=-1)
    """Optimizer steps in all, instead of epochs. -1: by epochs."""
    batch_size: int | None = option(None, minimum=1)
    """Rows an optimizer step, which the memory plan divides into micro-batches. none: by the next option and
    gradient_accumulation_steps."""
    per_device_train_batch_size: int = option(4, minimum=1)
    """Rows a micro-batch: packed rows of data.max_length tokens, or padded examples."""
    per_device_eval_batch_size: int | None = option(None, minimum=1, decides_result=False)
    """The same for held-out data. none: as in training."""
    gradient_accumulation_steps: int = option(1, minimum=1)
    """Micro-batches an optimizer step. The loss is the mean over all their trained tokens."""
    learning_rate: float = option(2e-4, above=0)
    """Peak learning rate."""
    loraplus_lr_ratio: float = option(1.0, above=0)
    """Learning rate of lora_B over that of lora_A (LoRA+; 16 is usual, with a lower learning_rate). 1: the same."""
    neftune_noise_alpha: float | None = option(None, above=0)
    """Size of the noise added to embeddings in training (NEFTune; 5 is usual). none: no noise."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    """How the learning rate falls."""
    lr_scheduler_kwargs: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the scheduler asks for beside that: min_lr=1e-5."""
    warmup_ratio: float = option(0.03, minimum=0, below=1)
    """Share of the steps in which the learning rate rises."""
    warmup_steps: int | None = option(None, minimum=0)
    """The same in steps, instead of warmup_ratio."""
    weight_decay: float = option(0.0, minimum=0)
    """Decoupled weight decay."""
    max_grad_norm: float = option(0.3, minimum=0)
    """Gradients are scaled down to this norm. 0: never."""
    optim: Literal[
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_bnb_8bit",
    ] = "adamw_8bit"
    """Optimizer. 8bit: blockwise 8-bit state; paged: state in host memory."""
    adam_beta1: float = option(0.9, minimum=0, below=1)
    """Decay of the mean of gradients."""
    adam_beta2: float = option(0.999, minimum=0, below=1)
    """Decay of the mean of squared gradients."""
    adam_epsilon: float = option(1e-8, above=0)
    """Added to the root of the mean square."""
    bf16: bool | None = None
    """true is model.dtype=bfloat16 by its usual name."""
    fp16: bool | None = None
    """true is model.dtype=float16 by its usual name."""
    fused: bool = True
    """Let fused blocks compute Llama, Mistral, Qwen2, Qwen3 and SmolLM3 layers. The result is the same but faster."""
    cuda_graphs: bool = True
    """On a GPU, launch all kernels of a micro-batch at once, as a graph. Needs fused blocks."""
    fp8: bool = False
    """Multiply frozen weights in fp8, adapters still in 16 bits: faster, but what the model computes is rounded more
    coarsely. Needs fused blocks, model.dtype=bfloat16, and an NVIDIA GPU that has fp8 (Ada, Hopper or newer)."""
    gradient_checkpointing: Literal["auto", "offload"] | bool = option("auto", decides_result=False)
    """Compute activations again in the backward pass instead of keeping them. auto: where they would not fit.
    offload: put them into host memory instead, as far as that is faster; fused blocks on a GPU only."""
    group_by_length: bool = False
    """Batch examples of like length; for data.packing=false."""
    on_bad_step: Literal["stop", "skip"] = option("stop", decides_result=False)
    """What to do at a step whose loss or gradient is not finite. Nothing of it is applied either way, and its examples
    are kept in bad_batches. skip: up to 9 in a row."""
    loss_spike: float | None = option(None, above=1, decides_result=False)
    """From the 20th step on, a loss that is so many times the running mean is bad too. none: never."""
    logging_steps: int = option(10, minimum=1, decides_result=False)
    """Optimizer steps between two logged losses; the first and the last are logged always."""
    eval_steps: int | None = option(None, minimum=1, decides_result=False)
    """Optimizer steps between two held-out evaluations. none: at the end of each epoch."""
    save_steps: int | None = option(None, minimum=1, decides_result=False)
    """Optimizer steps between two checkpoints. none: at the end of each epoch."""
    save_total_limit: int | None = option(2, minimum=1, decides_result=False)
    """Checkpoints kept, the newest; the one with the lowest held-out loss stays besides. none: all."""
    report_to: tuple[str, ...] = option(("tensorboard",), decides_result=False)
    """Loggers by their transformers names (tensorboard, wandb, mlflow, trackio, ...). none: no logger."""
    seed: int = option(42, minimum=0)
    """Of adapters, data order and dropout."""
    dataloader_num_workers: int = option(0, minimum=0, decides_result=False)
    """Processes that prepare batches beside the one that trains."""
    num_samples: int = option(3, minimum=0, decides_result=False)
    """Held-out questions whose answers are shown before and after."""
    max_sample_tokens: int = option(96, minimum=1, decides_result=False)
    """Longest such answer."""
    resume: Literal["auto"] | bool = option("auto", decides_result=False)
    """Go on from the last checkpoint in the output folder. auto: where a run of these options was cut short there.
    true: always, also for more epochs or steps than before. false: never."""
    overwrite: bool = option(False, decides_result=False)
    """Replace the run that the output folder holds."""

    def __post_init__(self) -> None:
        check_section(self, "train")
        if self.max_steps == 0:
            raise ConfigError("train.max_steps is 0; allowed: -1 (by epochs), or at least 1")
        if self.batch_size and self.gradient_accumulation_steps != 1:
            raise ConfigError(
                "the plan divides train.batch_size into micro-batches; leave train.gradient_accumulation_steps out"
            )
        if self.bf16 and self.fp16:
            raise ConfigError("train.bf16 and train.fp16 are both true; choose one")
        if self.fp8 and not self.fused:
            raise ConfigError("train.fp8 is true and train.fused false, but only fused blocks multiply in fp8")
        if self.resume is True and self.overwrite:
            raise ConfigError("train.resume and train.overwrite are both true; choose one")
