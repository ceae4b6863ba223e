"""Memory that runs out: the step is done again in a cheaper way, and the run ends with the same adapter."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from halfbyte.errors import PlanError
from halfbyte.models.attention import register_packed_attention
from halfbyte.models.fused_layers import iter_fused_layers
from halfbyte.models.streaming import is_streamed
from halfbyte.nn import LoraSpec, attach_adapters, quantize_linears_
from halfbyte.quant import QuantSpec
from halfbyte.train import HalfbyteTrainer
from halfbyte.train.relief import release_memory, relieve_
from tests.train.runs import build_examples, build_model, build_trainer, logged, trained_values
from tests.train.tiny import VOCABULARY

OUT = "out of memory on cpu: from now on"


def fail_at(trainer: HalfbyteTrainer, calls: set[int]) -> None:
    """Have memory run out in some forwards of the first decoder layer, counted from 1."""
    numbers = itertools.count(1)

    def hook(module: Any, args: Any) -> None:
        if next(numbers) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    trainer.model.model.layers[0].register_forward_pre_hook(hook)


def train(folder: Path, *, calls: set[int] = frozenset(), **options: Any) -> HalfbyteTrainer:  # type: ignore[assignment]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "max_steps": 3,
        "logging_steps": 1,
    }
    trainer = build_trainer(folder, **(settings | options))
    fail_at(trainer, calls)
    if calls:
        with pytest.warns(UserWarning, match=OUT):
            trainer.train()
    else:
        trainer.train()
    return trainer


@pytest.mark.parametrize("calls", [{1}, {5}, {6, 8}], ids=str)
def test_the_run_is_the_same(tmp_path: Path, calls: set[int]) -> None:
    whole, rescued = train(tmp_path / "a"), train(tmp_path / "b", calls=calls)
    assert logged(whole) == logged(rescued)
    for (name, expected), value in zip(
        trained_values(whole.model).items(), trained_values(rescued.model).values(), strict=True
    ):
        assert torch.equal(expected, value), name
    assert any(note.startswith(OUT) for note in rescued.notes)
    # Gate and up first; the second time whole blocks: a CPU has nowhere to put activations away.
    expected = {"mlp"} if len(calls) == 1 else {"block"}
    assert {layer.halfbyte_binding.policy for layer in iter_fused_layers(rescued.model)} == expected


def test_without_fused_blocks_layers_are_computed_again(tmp_path: Path) -> None:
    rescued = train(tmp_path / "b", calls={4}, model=build_model("gemma2"))
    whole = train(tmp_path / "a", model=build_model("gemma2"))
    assert any(getattr(module, "gradient_checkpointing", False) for module in rescued.model.modules())
    assert logged(whole) == logged(rescued)


def test_with_no_way_left_the_message_says_what_to_do(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, max_steps=1)
    fail_at(trainer, set(range(1, 99)))
    with (
        pytest.warns(UserWarning, match=OUT),
        pytest.raises(PlanError, match=r"smaller train\.per_device_train_batch_size"),
    ):
        trainer.train()


def test_of_batches_of_different_sizes_the_largest_comes_first(tmp_path: Path) -> None:
    sizes: list[int] = []
    examples = build_examples(12)
    trainer = build_trainer(tmp_path, examples=examples, row_tokens=None, max_steps=2, per_device_train_batch_size=2)
    trainer.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    state = torch.get_rng_state()
    trainer.train()
    assert sizes[0] == max(len(example) for example in examples)
    plain = build_trainer(
        tmp_path / "b", examples=examples, row_tokens=None, max_steps=2, per_device_train_batch_size=2
    )
    plain.relief.rehearse = lambda batch: None  # type: ignore[method-assign]
    torch.set_rng_state(state)
    plain.train()
    assert logged(plain) == logged(trainer)


def build_wide(device: torch.device) -> PreTrainedModel:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8),
            dtype=torch.bfloat16,
            attn_implementation=register_packed_attention(),
        )
    quantize_linears_(model, QuantSpec())
    attach_adapters(model, LoraSpec(rank=8, seed=1))
    return model


@pytest.mark.gpu
def test_a_device_that_is_full_is_relieved(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    examples = build_examples(64, longest=2048)
    settings: dict[str, Any] = {"examples": examples, "row_tokens": 2048, "max_steps": 3, "use_cpu": False}
    whole = build_trainer(tmp_path / "a", model=build_wide(device), **settings)
    whole.train()
    expected = logged(whole)
    del whole
    model = build_wide(device)
    release_memory(device)
    trainer = build_trainer(tmp_path / "b", model=model, gradient_checkpointing=False, **settings)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 600 * 2**20) / total)
    try:
        with pytest.warns(UserWarning, match="out of memory on cuda"):
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(logged(trainer), expected, rtol=2e-2, atol=2e-2)
    assert not is_streamed(trainer.model)


@pytest.mark.gpu
def test_at_last_weights_visit_a_device(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    settings: dict[str, Any] = {"row_tokens": 256, "max_steps": 3, "use_cpu": False}
    whole = build_trainer(tmp_path / "a", model=build_wide(device), **settings)
    whole.train()
    trainer = build_trainer(tmp_path / "b", model=build_wide(device), **settings)
    changes = []
    while (change := relieve_(trainer.model, device, num_tokens=512)) is not None:
        changes.append(change)
    assert "in host memory" in changes[-1]
    assert is_streamed(trainer.model)
    trainer.train()
    torch.testing.assert_close(logged(trainer), logged(whole), rtol=2e-2, atol=2e-2)
