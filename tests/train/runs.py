"""A tiny run to be made in variations: model with adapters, examples, trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from halfbyte.data.examples import TokenizedExample
from halfbyte.models.attention import register_packed_attention
from halfbyte.nn import LoraSpec, attach_adapters, iter_trainable, quantize_linears_
from halfbyte.quant import QuantSpec
from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions
from tests.train.tiny import VOCABULARY, build_tiny, build_tokenizer

SPEC = LoraSpec(rank=4, alpha=8, dropout=0.1, seed=7)
NO_DROPOUT = LoraSpec(rank=4, alpha=8, dropout=0.0, seed=7)
ROW_TOKENS = 32


def build_model(family: str = "llama", *, quantized: bool = True, spec: LoraSpec = SPEC) -> PreTrainedModel:
    """Return a tiny model in 4 bits with adapters that do something already."""
    model = build_tiny(family)
    model.set_attn_implementation(register_packed_attention())
    if quantized:
        quantize_linears_(model, QuantSpec())
    attach_adapters(model, spec)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in iter_trainable(model):
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02, generator=generator)
    return model


def build_examples(count: int = 24, *, seed: int = 0, longest: int = ROW_TOKENS) -> list[TokenizedExample]:
    """Return examples of mixed lengths whose second half is learned."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, longest + 1, count)
    return [
        TokenizedExample(
            generator.integers(5, VOCABULARY, length), np.arange(length) >= length // 2, f"examples.jsonl:{number}"
        )
        for number, length in enumerate(lengths, start=1)
    ]


def build_trainer(
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    examples: Sequence[TokenizedExample] | None = None,
    eval_dataset: Sequence[TokenizedExample] | None = None,
    row_tokens: int | None = ROW_TOKENS,
    **options: Any,
) -> HalfbyteTrainer:
    """Return a trainer over a tiny model; further options are training arguments."""
    callbacks, spec = options.pop("callbacks", ()), options.pop("spec", SPEC)
    own = {
        name: options.pop(name)
        for name in ("loraplus_lr_ratio", "on_bad_step", "loss_spike", "fused")
        if name in options
    }
    defaults = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "optim": "adamw_8bit",
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
    }
    return HalfbyteTrainer(
        build_model(spec=spec) if model is None else model,
        HalfbyteArguments(str(folder), **{**defaults, **options}),
        train_dataset=build_examples() if examples is None else examples,
        eval_dataset=eval_dataset,
        processing_class=build_tokenizer(),
        callbacks=callbacks,
        options=TrainerOptions(row_tokens=row_tokens, base_model="tiny", lora=spec, **own),
    )


def trained_values(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a copy of everything that is trained."""
    return {name: parameter.detach().clone() for name, parameter in iter_trainable(model)}


def logged(trainer: HalfbyteTrainer, name: str = "loss") -> list[tuple[int, float]]:
    """Return (step, value) of everything that was logged under a name."""
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def assert_same_values(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Fail unless both hold the same bits under the same names."""
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different
