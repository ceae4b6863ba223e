"""transformers' TrainingArguments, with the names of older releases, held to what this package honours.

Recipes outlive the names in them. `warmup_ratio`, `group_by_length`, `evaluation_strategy` and others are gone from
transformers, `gradient_checkpointing` is on its way to `activation_checkpointing`; all of them are accepted here and
translated to what the installed release has. An option that would be ignored is an error that says so.

bf16 and fp16 say what the model computes in, which is the model's own business here: no autocast wraps the forward,
and bf16=True needs no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from halfbyte.distributed import current_world
from halfbyte.errors import ConfigError
from halfbyte.train.loggers import check_loggers

NAMES = frozenset(field.name for field in dataclasses.fields(TrainingArguments))
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "xpu_backend": "ddp_backend",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}
# Old options that only say what is the case here, with the value they may have.
ALREADY_SO: dict[str, object] = {
    "save_safetensors": True,
    "include_tokens_per_second": True,
    "dispatch_batches": None,
    "split_batches": None,
    "half_precision_backend": "auto",
    "fp16_backend": "auto",
}
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")

# Options of transformers that this loop does not honour, with what they must be and the way out.
_UNUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "deepspeed": (
        lambda value: not value,
        "under torchrun every rank has the whole base; it is not divided between cards",
    ),
    "fsdp": (lambda value: not value, "under torchrun every rank has the whole base"),
    "torch_compile": (lambda value: not value, "the loop calls the layers of the model itself"),
    "use_liger_kernel": (lambda value: not value, "the loss is chunked already"),
    "auto_find_batch_size": (lambda value: not value, "set per_device_train_batch_size"),
    "push_to_hub": (lambda value: not value, "upload the output folder when training is done"),
    "label_smoothing_factor": (lambda value: value == 0, "the loss is plain cross-entropy"),
    "optim_args": (lambda value: not value, "the optimizers here have no such options"),
    "optim_target_modules": (lambda value: not value, "the optimizers here have no such options"),
    "bf16_full_eval": (lambda value: not value, "evaluation computes in what training computes in"),
    "fp16_full_eval": (lambda value: not value, "evaluation computes in what training computes in"),
    "enable_jit_checkpoint": (lambda value: not value, "use save_steps"),
    "save_only_model": (lambda value: not value, "checkpoints always hold what resuming needs"),
    "dataloader_persistent_workers": (lambda value: not value, "each epoch packs anew, which they would not notice"),
    "ignore_data_skip": (lambda value: not value, "a resumed run goes on at the batch where it stopped"),
}


class HalfbyteArguments(TrainingArguments):
    """TrainingArguments that take old names too; `checkpointing` and `logging_dir` are added.

    Args:
        output_dir: Where the run is written.
        **options: Any option of TrainingArguments, by its name now or before. gradient_checkpointing may be "auto" or
            "offload".

    Raises:
        ConfigError: An option is unknown, or is one that cannot be honoured.
    """

    def __init__(self, output_dir: str | None = None, **options: Any) -> None:
        options = translate_names(options)
        name = CHECKPOINTING[0] if CHECKPOINTING[0] in NAMES else CHECKPOINTING[1]
        self.checkpointing = options.pop(name, None) or False
        options.pop("gradient_checkpointing", None)
        self.logging_dir: str | None = options.pop("logging_dir", None)
        self.overwrite_output_dir: bool = options.pop("overwrite_output_dir", False)
        default_loggers = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
        options.setdefault("report_to", default_loggers)
        if not current_world().is_main:
            options["report_to"] = "none"
        with _deaf_to("transformers.training_args") if current_world().size > 1 else contextlib.nullcontext():
            super().__init__(output_dir=output_dir, **options)

    def __post_init__(self) -> None:
        wanted = {"bf16": self.bf16, "fp16": self.fp16}
        if all(wanted.values()):
            raise ConfigError("bf16 and fp16 are both true; choose one")
        self.bf16 = self.fp16 = False
        super().__post_init__()
        self.bf16, self.fp16 = wanted["bf16"], wanted["fp16"]
        # A list by now.
        check_loggers(self.report_to)  # type: ignore[arg-type]
        # accelerate would wrap the forward in autocast for anything but "no".
        self.mixed_precision = "no"
        self.logging_nan_inf_filter = False
        self.logging_first_step = True
        self.remove_unused_columns = False
        # One process, one device: several visible GPUs would otherwise mean torch's DataParallel.
        self._n_gpu = min(self.n_gpu, 1)
        for name, (fits, why) in _UNUSED.items():
            value = getattr(self, name, None)
            if not fits(value):
                raise ConfigError(f"{name}={value!r} cannot be honoured: {why}; leave it out")
        if self.parallel_mode == ParallelMode.DISTRIBUTED:
            raise ConfigError(
                "torchrun has started this process, which has not joined; call halfbyte.join_world() first"
            )

    def describe_steps(self, num_batches: int, *, row_tokens: int | None, ranks: int) -> str:
        """Say how many steps a run has, and what each of them holds.

        Args:
            num_batches: Micro-batches of an epoch, of one rank.
            row_tokens: Of a packed row; None where examples are padded.
            ranks: How many take part.
        """
        optimizer, scheduler = (getattr(name, "value", name) for name in (self.optim, self.lr_scheduler_type))
        per_epoch = max(math.ceil(num_batches / self.gradient_accumulation_steps), 1)
        steps = self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * per_epoch)
        kind = f"rows of {row_tokens} tokens" if row_tokens else "padded examples"
        times = f"{self.gradient_accumulation_steps} x " if self.gradient_accumulation_steps > 1 else ""
        times += f"{ranks} ranks x " if ranks > 1 else ""
        return (
            f"run: {steps} steps ({steps / per_epoch:.3g} epochs of {per_epoch}), each of "
            f"{times}{self.per_device_train_batch_size} {kind}; {optimizer}, learning rate {self.learning_rate:g}, "
            f"{scheduler} after {self.get_warmup_steps(steps)} steps of warmup"
        )

    def set_checkpointing(self, on: bool) -> None:
        """Say, under the names that the installed Trainer reads, whether activations are computed again."""
        for name in CHECKPOINTING:
            if name in NAMES:
                setattr(self, name, on)
                # The embedding is frozen, so the first block's input has no gradient, which only this kind stands.
                kwargs = getattr(self, f"{name}_kwargs") or {}
                setattr(self, f"{name}_kwargs", {**kwargs, "use_reentrant": False})


@contextlib.contextmanager
def _deaf_to(logger_name: str) -> Iterator[None]:
    """Keep a library from warning that it was not told of ranks that it is not to know of."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def translate_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under the names of the installed transformers.

    Raises:
        ConfigError: There is no such option, or two names for one are given with different values.
    """
    out: dict[str, Any] = {}
    for name, value in options.items():
        if name in ALREADY_SO and name not in NAMES:
            if value not in (ALREADY_SO[name], None):
                raise ConfigError(f"{name}={value!r} cannot be honoured; only {ALREADY_SO[name]!r} is possible")
            continue
        for new, new_value in _translated(name, value).items():
            if new in out and out[new] != new_value:
                raise ConfigError(f"{name}={value!r} contradicts {new}={out[new]!r}; give one of them")
            out[new] = new_value
    if "warmup_ratio" in out:
        ratio = out.pop("warmup_ratio")
        if ratio and out.get("warmup_steps"):
            raise ConfigError(f"warmup_ratio={ratio} and warmup_steps={out['warmup_steps']} are both set; give one")
        # Below 1, warmup_steps is a share of all steps.
        out.setdefault("warmup_steps", ratio or 0)
    unknown = [name for name in out if name not in NAMES and name not in ("logging_dir", "overwrite_output_dir")]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*NAMES, *RENAMED], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no training argument {unknown[0]}{hint}")
    return out


def _translated(name: str, value: Any) -> dict[str, Any]:
    if name == "group_by_length" and name not in NAMES:
        return {"train_sampling_strategy": "group_by_length"} if value else {}
    for ending in ("", "_kwargs"):
        names = [stem + ending for stem in CHECKPOINTING]
        if name in names:
            # None stands for "not given" in both names.
            return {} if value is None else {next(n for n in names if n in NAMES): value}
    if name not in NAMES and name in RENAMED:
        return {RENAMED[name]: value}
    return {name: value}
