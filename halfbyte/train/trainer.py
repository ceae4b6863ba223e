"""The training loop: transformers.Trainer with our loss, optimizer, data order, guard and checkpoints.

transformers gives the loop, its arguments, schedulers, callbacks and loggers. Ours are:

- the loss, over hidden states in chunks, divided by the trained tokens of the whole accumulated batch;
- the optimizer, and a guard before it that clips, scales and stops without waiting for the device;
- the order of the data, a function of seed and epoch; accelerate touches neither batches nor model;
- evaluation without logits, that leaves no trace in the training around it;
- checkpoints of what is trained, written whole or not at all, from which a run goes on bit for bit.

Nothing waits for the device in a micro-batch, and a step waits only for the one before.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from halfbyte.data.examples import TokenizedExample
from halfbyte.device import keep_freed_memory
from halfbyte.distributed import current_world
from halfbyte.errors import ConfigError
from halfbyte.models.adapter_files import save_adapter
from halfbyte.models.card_split import cards_of
from halfbyte.models.fused_layers import fuse_layers_
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.packed_inputs import compute_dtype_of, prove_causality, prove_isolation
from halfbyte.nn.attach import count_parameters
from halfbyte.optim import build_optimizer
from halfbyte.train.activations import choose_checkpointing, choose_policy_
from halfbyte.train.arguments import HalfbyteArguments
from halfbyte.train.bad_steps import BadSteps, DivergedError
from halfbyte.train.batches import (
    BatchOptions,
    EpochLoader,
    build_loader,
    iter_batches,
    largest_batch,
    move_batch,
    pad_id_of,
)
from halfbyte.train.callbacks import FlowCallback, SavingCallback, with_progress
from halfbyte.train.checks import check_model, honour_precision_, infer_spec, refuse_ignored
from halfbyte.train.evaluate import HeldOut, evaluate_loss
from halfbyte.train.feed import PATIENCE_SECONDS, Feed
from halfbyte.train.fp8 import check_fp8
from halfbyte.train.groups import parameter_groups
from halfbyte.train.guard import LossScaler, StepGuard
from halfbyte.train.interruption import Interruption
from halfbyte.train.loss import LossPath
from halfbyte.train.meter import Meter
from halfbyte.train.micro_batch import MicroBatches
from halfbyte.train.options import DEFAULT_OPTIONS, TrainerOptions
from halfbyte.train.ranks import agree_on_run, seed_of_micro_batch
from halfbyte.train.relief import Relief
from halfbyte.train.resumable import ResumableTrainer
from halfbyte.train.saver import CheckpointSaver, saying_what_is_left
from halfbyte.train.snapshot import TokenizerFiles
from halfbyte.train.tensorboard import make_patient


class HalfbyteTrainer(ResumableTrainer):
    """Trains the adapters of a model.

    Args:
        model: A causal language model with something to train.
        args: As transformers' TrainingArguments, with their old names.
        train_dataset: Tokenised examples.
        eval_dataset: Held-out ones.
        processing_class: The tokenizer, saved beside the adapter.
        callbacks: Beside transformers' own.
        options: See TrainerOptions.
        **others: Further arguments of transformers.Trainer; those that would be ignored are refused.

    Raises:
        ConfigError: Something cannot be honoured.
    """

    loss_is_scaled_for_ga = True
    eval_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: HalfbyteArguments,
        *,
        train_dataset: Sequence[TokenizedExample] | None = None,
        eval_dataset: Sequence[TokenizedExample] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        options: TrainerOptions = DEFAULT_OPTIONS,
        **others: Any,
    ) -> None:
        refuse_ignored(others)
        check_model(model, args)
        self.world = current_world()
        note = honour_precision_(model, args)
        self.options = options
        self.base_model = options.base_model or model.config._name_or_path
        self.lora = options.lora or infer_spec(model)
        self.interruption = Interruption(self.world)
        self.saver = CheckpointSaver(
            Path(str(args.output_dir)), tokenizer=TokenizerFiles(processing_class), say=self.say, warn=self.tell
        )
        self.guard = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[
                FlowCallback(self.interruption),
                SavingCallback(self.saver),
                *with_progress(callbacks, args, is_heard=self.world.is_main),
            ],
            **others,
        )
        self.notes = [] if note is None else [note]
        if self.world.size > 1:
            self.notes.append(f"{self.world}; each takes its turn of the batches")
            self.world.copy_from_main_([parameter.data for parameter in model.parameters() if parameter.requires_grad])
        self._choose_loggers(args)
        # Read by transformers 5.17, which has no loss_is_scaled_for_ga.
        self.model_accepts_loss_kwargs = True
        self.model_device = compute_device_of(model)
        self.feed = Feed(self._build_loader, self.tell)
        self.meter = Meter(cards_of(model, self.model_device))
        self.held_out: HeldOut | None = None
        self.held_out_step = -1
        self._step_micro_batches = 0
        self.scaler = LossScaler(self.model_device) if compute_dtype_of(model) == torch.float16 else None
        self._trainable_count, self._total_count = count_parameters(model)
        is_fused = self._choose_path()
        self._choose_activations(args, is_fused=is_fused)
        self.micro_batches = MicroBatches(model, self.loss_path, as_graphs=options.cuda_graphs, world=self.world)
        self.notes += [self.micro_batches.note] if self.micro_batches.note else []
        self.relief = Relief(self.micro_batches, num_tokens=self._largest_batch_tokens(), tell=self.tell)

    def _choose_loggers(self, args: HalfbyteArguments) -> None:
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        logs = args.logging_dir or str(Path(self.args.output_dir) / "logs")
        handler = self.callback_handler
        handler.callbacks = [make_patient(callback, logs, self.tell) for callback in handler.callbacks]

    def _choose_path(self) -> bool:
        """Decide what computes layers and loss, note it, and return whether fused blocks do."""
        model, options = self.model, self.options
        fusion = fuse_layers_(model, fp8=options.fp8) if options.fused else None
        self.notes.append("fused blocks: off, as set" if fusion is None else str(fusion))
        if options.fp8:
            self.notes.append(check_fp8(model, fusion))
        self.loss_path = LossPath(model)
        self.notes.append(self.loss_path.note)
        prove = prove_causality if options.row_tokens is None else prove_isolation
        prove(model)
        return fusion is not None and fusion.num_fused > 0

    def _choose_activations(self, args: HalfbyteArguments, *, is_fused: bool) -> None:
        """Decide what the backward finds, and note it."""
        model, num_tokens, on = self.model, self._largest_batch_tokens(), False
        if is_fused:
            note = choose_policy_(
                model, wanted=args.checkpointing, num_tokens=num_tokens, planned=self.options.policies
            )
        else:
            on, note = choose_checkpointing(model, self.loss_path, wanted=args.checkpointing, num_tokens=num_tokens)
        args.set_checkpointing(on)
        self.notes.append(note)

    def batch_options(self) -> BatchOptions:
        """Return how examples become batches in this run."""
        strategy = self.args.train_sampling_strategy
        return BatchOptions(
            pad_id=pad_id_of(self.processing_class),
            row_tokens=self.options.row_tokens,
            group_by_length=strategy == "group_by_length",
            is_shuffled=strategy != "sequential",
        )

    def get_train_dataloader(self) -> Any:
        return self._build_loader(self.args.dataloader_num_workers)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        loader = self.callback_handler.train_dataloader
        assert loader is not None
        per_epoch = max(math.ceil(len(loader) / self.args.gradient_accumulation_steps), 1)
        epoch, step = divmod(self.state.global_step, per_epoch)
        place = step * self.args.gradient_accumulation_steps
        batches = self.feed.take(epoch_iterator, num_batches, epoch=epoch, place=place)
        return batches, self._get_num_items_in_batch(batches, device)

    def _build_loader(self, num_workers: int) -> EpochLoader:
        if self.train_dataset is None:
            raise ConfigError("the trainer was given no train_dataset")
        return build_loader(
            self.train_dataset,
            self.batch_options(),
            batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            world=self.world,
            drop_last=self.args.dataloader_drop_last,
            num_workers=num_workers,
            timeout=PATIENCE_SECONDS if num_workers else 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if num_workers else None,
            pin_memory=self.args.dataloader_pin_memory and self.model_device.type == "cuda",
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        num_mine = sum(batch["num_trained"] for batch in batch_samples)
        num_trained, num_noted = self.world.sum(num_mine, self.interruption.was_noted)
        self.interruption.hear(was_noted=num_noted > 0)
        return max(int(num_trained), 1)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model where it was loaded."""

    def _largest_batch_tokens(self) -> int:
        longest = self.options.row_tokens or max((len(example) for example in self.train_dataset or ()), default=1)
        return longest * self.args.per_device_train_batch_size

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            lr, ratio = self.args.learning_rate, self.options.loraplus_lr_ratio
            self.optimizer = build_optimizer(
                str(getattr(self.args.optim, "value", self.args.optim)),
                parameter_groups(self.model, lr=lr, loraplus_lr_ratio=ratio),
                lr=lr,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        # A second train() finds the optimizer in accelerate's wrapper, which hands no flags on.
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        bad_steps = BadSteps(
            self.saver.folder,
            tokenizer=self.saver.tokenizer.tokenizer,
            on_bad_step=self.options.on_bad_step,
            tell=self.tell,
            world=self.world,
        )
        self.guard = StepGuard(
            inner,
            max_norm=self.args.max_grad_norm,
            scaler=self.scaler,
            world=self.world,
            add_up=self.micro_batches.add_up if self.world.size > 1 else None,
            bad_steps=bad_steps,
            loss_spike=self.options.loss_spike,
            device=self.model_device,
        )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        assert self.guard is not None
        if not model.training:
            model.train()
        self.meter.count(inputs)
        step = self.state.global_step + 1
        see = functools.partial(self.guard.see_loss, origins=inputs["origins"], step=step, inputs=inputs)
        factor = None if self.scaler is None else self.scaler.scale
        turn = self.state.global_step * self.args.gradient_accumulation_steps + self._step_micro_batches
        self._step_micro_batches += 1
        loss = self.relief.run(
            inputs,
            num_items=num_items_in_batch,
            seed=seed_of_micro_batch(self.args.seed, turn * self.world.size + self.world.rank),
            factor=factor,
            watch=see,
            is_last=self._step_micro_batches == self.current_gradient_accumulation_steps,
            again=self.guard.restart_step,
        )
        return self.guard.loss_to_log(loss, num_micro_batches=self.current_gradient_accumulation_steps)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        if return_outputs:
            raise ConfigError("compute_loss gives no outputs: logits are never whole; call the model for them")
        return self.loss_path(move_batch(inputs, self.model_device), num_items=num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        assert self.guard is not None
        self.meter.num_steps += 1
        self._step_micro_batches = 0
        self.relief.close_step()
        return self.guard.close_step(self.state.global_step + 1)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count two operations a weight and token forward, two for the input's gradient, two for adapters' own."""
        return inputs["input_ids"].numel() * (4 * self._total_count + 2 * self._trainable_count)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Train, and leave adapter and tokenizer in the output folder.

        On a CPU the process keeps the memory that it frees from here on: see `halfbyte.device.keep_freed_memory`.
        """
        if self.model_device.type == "cpu":
            keep_freed_memory()
        if self.world.size > 1:
            agree_on_run(self.world, self._run_state())
        if self.options.row_tokens is None and self.train_dataset:
            self.model.train()
            self.relief.rehearse(
                largest_batch(self.train_dataset, self.batch_options(), self.args.per_device_train_batch_size)
            )
        # What cannot be written at all is to fail now, not in hours.
        self.saver.tokenizer.prepare()
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        try:
            result = super().train(checkpoint, *args, **options)
            assert self.guard is not None
            self.guard.finish()
            self.meter.stop()
        except DivergedError as error:
            self.save_model()
            raise DivergedError(f"{error}. The adapter as it was before is kept in {self.args.output_dir}") from error
        finally:
            self.micro_batches.release()
            self.saver.wait()
        if self.state.global_step < self.state.max_steps:
            self.interruption.raise_stop(self.state.global_step, self.saver)
        with saying_what_is_left(self.saver.folder):
            self.save_model()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in {"loss", "train_loss"} & logs.keys():
            # Each rank has seen its share of the sum.
            (logs[name],) = self.world.sum(logs[name])
        if "loss" in logs:
            speed = self.meter.read()
            memory = speed.pop("memory_gib")
            logs |= dict(zip(speed, self.world.sum(*speed.values()), strict=True)) | {"memory_gib": memory}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the held-out loss, and tell the loggers."""
        started = time.perf_counter()
        self.held_out, self.held_out_step = self.measure(eval_dataset), self.state.global_step
        metrics = {
            f"{metric_key_prefix}_loss": self.held_out.loss,
            f"{metric_key_prefix}_perplexity": self.held_out.perplexity,
            f"{metric_key_prefix}_tokens": self.held_out.num_tokens,
            f"{metric_key_prefix}_runtime": time.perf_counter() - started,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, examples: Sequence[TokenizedExample] | None = None) -> HeldOut:
        """Return the held-out loss of the model as it stands, and tell nobody."""
        examples = self.eval_dataset if examples is None else examples
        if not examples:
            raise ConfigError("evaluation needs held-out examples; give eval_dataset")
        with self.meter.paused():
            rows = self.args.per_device_eval_batch_size
            batches = iter_batches(examples, self.batch_options(), batch_size=rows, world=self.world)
            return evaluate_loss(self.model, batches, loss_path=self.loss_path, world=self.world)

    def describe_plan(self) -> str:
        """Say how many steps there will be, and what each of them holds."""
        num_batches = len(self.get_train_dataloader())
        return self.args.describe_steps(num_batches, row_tokens=self.options.row_tokens, ranks=self.world.size)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError("predict() would hold all logits; use evaluate(), or halfbyte.models.generate")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write adapter and tokenizer, where this is the first rank."""
        if not self.world.is_main:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder, base_model=self.base_model, spec=self.lora)
        self.saver.tokenizer.write(folder)
