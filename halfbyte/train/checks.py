"""What is looked at before a trainer is built, so that it fails before the first step and not after it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.packed_inputs import compute_dtype_of
from halfbyte.nn import LoraSpec, iter_lora
from halfbyte.nn.attach import iter_saved
from halfbyte.nn.vocabulary import iter_token_rows
from halfbyte.train.arguments import HalfbyteArguments


def refuse_ignored(others: dict[str, Any]) -> None:
    """Refuse arguments of transformers.Trainer that this trainer would not use.

    Raises:
        ConfigError: One of them is given.
    """
    reasons = {
        "data_collator": "batches are made by halfbyte.train.batches",
        "model_init": "give the model itself",
        "compute_loss_func": "the loss is cross-entropy over the trained tokens",
        "compute_metrics": "evaluation measures the loss, without logits",
        "preprocess_logits_for_metrics": "evaluation measures the loss, without logits",
        "optimizer_cls_and_kwargs": "name an optimizer with args.optim",
    }
    for name, value in others.items():
        if value is not None and name in reasons:
            raise ConfigError(f"{name} cannot be honoured: {reasons[name]}; leave it out")


def check_model(model: PreTrainedModel, args: HalfbyteArguments) -> None:
    """Make sure that a model can be trained with these arguments.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(args, HalfbyteArguments):
        raise ConfigError(
            f"args is a {type(args).__name__}; use halfbyte.train.HalfbyteArguments, which takes the same"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the model has nothing to train; attach adapters first (halfbyte.nn.attach_adapters)")
    device = compute_device_of(model)
    if device.type != args.device.type:
        way = "pass use_cpu=True" if device.type == "cpu" else "leave use_cpu out"
        raise ConfigError(f"the model is on {device} and the arguments say {args.device}; {way}, or load it there")
    if (device.index or 0) != (args.device.index or 0):
        raise ConfigError(
            f"the model is on {device} and the arguments say {args.device}; load it there, and choose the card with "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )


def honour_precision_(model: PreTrainedModel, args: HalfbyteArguments) -> str | None:
    """Make the model compute in what bf16 or fp16 ask for, and say it where that is not done."""
    wanted = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    current = compute_dtype_of(model)
    if wanted is None or wanted == current:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (wanted, current)]
    if args.device.type == "cpu":
        return f"asked for {names[0]}; the model was loaded to compute in {names[1]} on this CPU, and does"
    # Adapters are left in fp32 by this, see halfbyte.nn.
    module: nn.Module = model
    module.to(dtype=wanted)
    if compute_dtype_of(model) != wanted:
        raise ConfigError(
            f"asked for {names[0]}, but the model was loaded to compute in {names[1]}; load it in {names[0]}"
        )
    return f"computing in {names[0]}; the model was loaded in {names[1]}"


def infer_spec(model: PreTrainedModel) -> LoraSpec:
    """Return a spec that describes the adapters that a model has, layer by layer.

    Raises:
        ConfigError: It has none.
    """
    layers = dict(iter_lora(model))
    saved = tuple(path for path, _ in iter_saved(model))
    if not layers:
        raise ConfigError("the model has no adapters; attach some first (halfbyte.nn.attach_adapters)")
    first = next(iter(layers.values()))
    return LoraSpec(
        rank=first.rank,
        alpha=first.alpha,
        dropout=first.dropout,
        rslora=first.rslora,
        dora=first.lora_magnitude_vector is not None,
        targets=tuple(layers),
        rank_pattern={re.escape(path): x.rank for path, x in layers.items() if x.rank != first.rank},
        alpha_pattern={re.escape(path): x.alpha for path, x in layers.items() if x.alpha != first.alpha},
        modules_to_save=saved,
        trainable_tokens={path: wrapper.table.token_ids for path, wrapper in iter_token_rows(model)},
    )
