"""Training one model over several cards of one process: the same numbers as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.models import load_model
from halfbyte.models.attention import PACKED_ATTENTION
from halfbyte.nn import LoraSpec, attach_adapters
from halfbyte.quant import QuantSpec
from tests.models.tiny import build_tiny
from tests.train.runs import assert_same_values, build_trainer, logged, trained_values

# Two names of the one CPU, as two cards: everything is passed along, and numbers must not change by that.
CPU, OTHER = torch.device("cpu"), torch.device("cpu", 0)
SPEC = LoraSpec(rank=8, alpha=16, dropout=0.1, seed=3)
NO_DROPOUT = LoraSpec(rank=8, alpha=16, dropout=0.0, seed=3)
Shares = dict[torch.device, float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_tiny("llama", num_hidden_layers=4, vocab_size=128).save_pretrained(folder)
    return folder


def load(folder: Path, shares: Shares, *, dtype: str = "float32", spec: LoraSpec = SPEC) -> PreTrainedModel:
    loaded = load_model(
        folder,
        quant=QuantSpec(),
        compute_dtype=dtype,
        device=next(iter(shares)),
        attn_implementation=PACKED_ATTENTION,
        card_shares=shares,
    )
    attach_adapters(loaded.model, spec)
    return loaded.model


def train(model: PreTrainedModel, out: Path, **options: Any) -> dict[str, Any]:
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, **options}
    trainer = build_trainer(out, model=model, spec=SPEC, **options)
    trainer.train()
    return {"losses": logged(trainer, "loss"), "adapter": trained_values(model), "notes": trainer.notes}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_training_over_two_cards_equals_training_on_one(
    fused: bool, checkpointing: bool, folder: Path, tmp_path: Path
) -> None:
    results = []
    for name, shares in (("one", {CPU: 1.0}), ("two", {CPU: 1.0, OTHER: 1.0})):
        results.append(train(load(folder, shares), tmp_path / name, fused=fused, gradient_checkpointing=checkpointing))
    one, two = results
    assert len(one["losses"]) == 4
    assert one["losses"] == two["losses"]
    assert_same_values(one["adapter"], two["adapter"])


def test_a_run_over_two_cards_goes_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    shares = {CPU: 1.0, OTHER: 1.0}
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(load(folder, shares), tmp_path, **options)
    trainer = build_trainer(tmp_path, model=load(folder, shares), spec=SPEC, gradient_accumulation_steps=2, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(trainer, "loss") == whole["losses"]
    assert_same_values(trained_values(trainer.model), whole["adapter"])


def gradients(model: PreTrainedModel, out: Path, **options: Any) -> tuple[float, torch.Tensor]:
    """Return the loss of a first micro-batch and all gradients."""
    trainer = build_trainer(out, model=model, use_cpu=model.device.type == "cpu", **options)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    loss = trainer.micro_batches.run(batch, num_items=batch["num_trained"])
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) == 2 * 7 * 4
    return float(loss), torch.cat([grad.flatten().cpu() for grad in grads])


@pytest.mark.gpu
def test_a_gpu_and_the_cpu_as_two_cards(folder: Path, tmp_path: Path) -> None:
    # Whatever is not passed along fails here, with one GPU.
    mixed = load(folder, {torch.device("cuda", 0): 1.0, CPU: 1.0}, spec=NO_DROPOUT)
    assert set(mixed.hf_device_map.values()) == {0, "cpu"}
    loss, gradient = gradients(mixed, tmp_path / "mixed", fused=False)
    expected_loss, expected = gradients(load(folder, {CPU: 1.0}, spec=NO_DROPOUT), tmp_path / "cpu", fused=False)
    # Sums of up to 128 products in another order, through 4 blocks of 2 halves, forth and back: 16 times the root of
    # 128 roundings, none of which is above an eps.
    limit = 16 * 128**0.5 * torch.finfo(torch.float32).eps
    assert loss == pytest.approx(expected_loss, rel=limit)
    assert (gradient - expected).norm() <= limit * expected.norm()
    trained = train(
        load(folder, {torch.device("cuda", 0): 1.0, CPU: 1.0}), tmp_path / "run", fused=False, use_cpu=False
    )
    assert len(trained["losses"]) == 4
    assert trained["losses"][-1][1] < trained["losses"][0][1]


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@needs_two
@pytest.mark.parametrize("fused", [False, True])
def test_two_gpus_compute_what_one_does(fused: bool, folder: Path, tmp_path: Path) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    results = {}
    for name, shares in (("one", {first: 1.0}), ("two", {first: 1.0, second: 1.0})):
        model = load(folder, shares, dtype="bfloat16", spec=NO_DROPOUT)
        results[name] = gradients(model, tmp_path / name, fused=fused)
    # The same kernels on cards of one kind; only attention's backward adds in an order of its own, in bf16.
    assert results["two"][0] == results["one"][0]
    difference = (results["two"][1] - results["one"][1]).norm() / results["one"][1].norm()
    assert difference <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
@needs_two
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": "offload"}, {"fused": False}]
)
def test_a_run_over_two_gpus(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    shares = {torch.device("cuda", 0): 1.0, torch.device("cuda", 1): 1.0}
    trained = train(load(folder, shares, dtype="bfloat16"), tmp_path, use_cpu=False, max_steps=8, **options)
    assert trained["losses"][-1][1] < trained["losses"][0][1]
    assert any("on several cards" in note for note in trained["notes"]) or not options.get("fused", True)
