"""Micro-batches: filling up changes no loss, and a graph of kernels computes what its kernels do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.distributed import World
from halfbyte.memory.activation_policy import Policy
from halfbyte.models.fused_layers import fuse_layers_, set_policy
from halfbyte.nn import LoraSpec, iter_trainable
from halfbyte.train.batches import BatchOptions, iter_batches, move_batch
from halfbyte.train.loss import LossPath
from halfbyte.train.micro_batch import MicroBatches, pad_micro_batch
from tests.oracles import assert_close
from tests.train.runs import NO_DROPOUT, ROW_TOKENS, SPEC, build_examples, build_model
from tests.train.tiny import VOCABULARY

CPU = torch.device("cpu")


def make_batches(*, row_tokens: int | None = ROW_TOKENS, count: int = 24) -> list[dict[str, Any]]:
    options = BatchOptions(pad_id=0, row_tokens=row_tokens)
    return list(iter_batches(build_examples(count), options, batch_size=2))


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in iter_trainable(model) if p.grad is not None}


@pytest.mark.parametrize("row_tokens", [ROW_TOKENS, None], ids=["packed", "padded"])
def test_filling_up_changes_neither_loss_nor_gradients(row_tokens: int | None) -> None:
    model = build_model(spec=NO_DROPOUT)
    loss_path = LossPath(model)
    counts = set()
    for batch in make_batches(row_tokens=row_tokens):
        results = []
        padded = pad_micro_batch(batch)
        counts.add(padded["trained"].numel())
        for one in (batch, padded):
            model.zero_grad()
            loss = loss_path(move_batch(one, CPU), num_items=50)
            loss.backward()
            results.append((loss.detach(), gradients_of(model)))
        (loss, gradients), (padded_loss, padded_gradients) = results
        assert_close("loss", loss, padded_loss, dtype=torch.float32, roundings=8)
        for name, gradient in gradients.items():
            assert_close(name, gradient, padded_gradients[name], dtype=torch.float32, roundings=64)
    # Of 64 tokens.
    assert row_tokens is None or all(count % 8 == 0 for count in counts)


def test_filled_up_boundaries_end_with_empty_documents() -> None:
    batch = next(b for b in make_batches() if b["document_layout"].runs != ((2, ROW_TOKENS),))
    padded = pad_micro_batch(batch)
    boundaries = padded["cu_seq_lens"]
    assert boundaries.numel() == 17
    assert boundaries[: batch["cu_seq_lens"].numel()].equal(batch["cu_seq_lens"])
    assert (boundaries[batch["cu_seq_lens"].numel() :] == 2 * ROW_TOKENS).all()
    assert not padded["document_layout"].is_fixed


def test_micro_batches_on_a_cpu_add_up_to_autograd() -> None:
    model = build_model(spec=NO_DROPOUT)
    fuse_layers_(model)
    loss_path, batches = LossPath(model), make_batches()[:3]
    runner = MicroBatches(model, loss_path, as_graphs=True)
    assert not runner.as_graphs
    seen: list[torch.Tensor] = []
    losses = [runner.run(batch, num_items=40, watch=seen.append) for batch in batches]
    actual = gradients_of(model)
    model.zero_grad()
    total = sum(loss_path(move_batch(batch, CPU), num_items=40) for batch in batches)
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert_close("loss", total, torch.stack(losses).sum(), dtype=torch.float32, roundings=8)
    assert [loss.item() for loss in seen] == [loss.item() for loss in losses]
    for name, gradient in gradients_of(model).items():
        assert_close(name, gradient, actual[name], dtype=torch.float32, roundings=64)


def run_on_gpu(
    *,
    as_graphs: bool,
    family: str,
    spec: LoraSpec,
    policy: Policy | tuple[Policy, ...] = "keep",
    row_tokens: int | None = ROW_TOKENS,
) -> tuple[list[float], list[dict[str, torch.Tensor]], MicroBatches]:
    """Return losses, and gradients after every second micro-batch, of three times the same ones."""
    model = build_model(family, spec=spec).cuda().bfloat16().train()
    assert fuse_layers_(model).num_fused
    set_policy(model, policy)
    runner = MicroBatches(model, LossPath(model), as_graphs=as_graphs)
    batches = make_batches(row_tokens=row_tokens, count=16)
    batches = batches[: len(batches) // 2 * 2]
    torch.manual_seed(5)
    losses, gradients = [], []
    for number, batch in enumerate(batches * 3):
        losses.append(runner.run(batch, num_items=40 + number % 2))
        if number % 2:
            gradients.append(gradients_of(model))
            model.zero_grad()
    return [loss.item() for loss in losses], gradients, runner


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [SPEC, NO_DROPOUT], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("row_tokens", [ROW_TOKENS, None], ids=["packed", "padded"])
def test_graphs_compute_what_their_kernels_do(row_tokens: int | None, family: str, spec: LoraSpec) -> None:
    losses, gradients, _ = run_on_gpu(as_graphs=False, family=family, spec=spec, row_tokens=row_tokens)
    recorded_losses, recorded, runner = run_on_gpu(as_graphs=True, family=family, spec=spec, row_tokens=row_tokens)
    assert runner._graphs
    assert_close("losses", torch.tensor(losses), torch.tensor(recorded_losses), dtype=torch.bfloat16, roundings=1)
    for expected, actual in zip(gradients, recorded, strict=True):
        for name, gradient in expected.items():
            assert_close(name, gradient, actual[name], dtype=torch.bfloat16, roundings=4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("as_graphs", [False, True], ids=["kernel by kernel", "as graphs"])
@pytest.mark.parametrize("spec", [SPEC, NO_DROPOUT], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("policy", ["mlp", "block", "offload", ("offload", "keep"), ("block", "offload")], ids=str)
def test_micro_batches_compute_the_same_under_every_policy(
    policy: Policy | tuple[Policy, ...], spec: LoraSpec, as_graphs: bool, family: str
) -> None:
    losses, gradients, _ = run_on_gpu(as_graphs=as_graphs, family=family, spec=spec)
    others, other_gradients, runner = run_on_gpu(as_graphs=as_graphs, family=family, spec=spec, policy=policy)
    assert bool(runner._graphs) is as_graphs
    assert losses == others
    for expected, actual in zip(gradients, other_gradients, strict=True):
        assert [name for name, gradient in expected.items() if not gradient.equal(actual[name])] == []


@dataclasses.dataclass(frozen=True)
class Watching(World):
    """Two ranks, of which the other one has nothing; holds what was sent, as it was on the device by then."""

    sent: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def begin_adding_(self, tensor: torch.Tensor) -> Callable[[], None]:
        self.sent.append(tensor.clone())
        return lambda: None


@pytest.mark.gpu
@pytest.mark.parametrize("as_graphs", [False, True], ids=["kernel by kernel", "as graphs"])
@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_gradients_are_complete_when_they_are_sent(policy: Policy, as_graphs: bool) -> None:
    model = build_model(spec=SPEC).cuda().bfloat16().train()
    fuse_layers_(model)
    set_policy(model, policy)
    world = Watching(size=2)
    runner = MicroBatches(model, LossPath(model), as_graphs=as_graphs, world=world)
    exchange = runner.exchange
    exchange.piece_bytes = 2**9
    batches = make_batches(count=16)
    for step in range(4):
        world.sent.clear()
        # The device is far behind the host, which sends without waiting.
        torch.cuda._sleep(50_000_000)
        runner.run(batches[0], num_items=40, seed=step)
        assert world.sent == []
        runner.run(batches[0], num_items=40, seed=step + 9, is_last=True)
        num_early = len(world.sent)
        runner.add_up()
        # As events that a graph records, where torch has them; the last piece of a backward is early as well.
        assert num_early == len(exchange.pieces) > 8
        torch.cuda.synchronize()
        for piece, sent in zip(exchange.pieces, world.sent, strict=True):
            assert sent.any()
            assert sent.equal(piece.stretch)
        for parameter in runner.parameters:
            parameter.grad = None
    assert bool(runner._graphs) is as_graphs


@pytest.mark.gpu
def test_release_gives_host_memory_back_and_training_can_go_on() -> None:
    losses, _, runner = run_on_gpu(as_graphs=True, family="llama", spec=NO_DROPOUT, policy="offload")
    assert runner.offload is not None
    assert runner.offload.host_bytes
    runner.release()
    assert runner.offload.host_bytes == 0
    again = [runner.run(batch, num_items=40).item() for batch in make_batches(count=16)[:2] * 3]
    assert_close("losses", torch.tensor([losses[0]] * 3), torch.tensor(again[::2]), dtype=torch.bfloat16, roundings=1)
    assert runner._graphs
    assert runner.offload.host_bytes


@pytest.mark.gpu
def test_dropout_differs_between_launches_of_a_graph() -> None:
    losses, _, runner = run_on_gpu(as_graphs=True, family="llama", spec=LoraSpec(rank=4, alpha=64, dropout=0.5, seed=7))
    assert runner._graphs
    assert len(set(losses)) == len(losses)


@pytest.mark.gpu
def test_a_graph_is_not_launched_after_parameters_have_moved() -> None:
    _, _, runner = run_on_gpu(as_graphs=True, family="llama", spec=NO_DROPOUT)
    batch = make_batches()[0]
    before = runner.run(batch, num_items=VOCABULARY).item()
    for parameter in runner.parameters:
        parameter.data = parameter.data.clone().zero_()
    assert runner.run(batch, num_items=VOCABULARY).item() != before


@pytest.mark.gpu
def test_graphs_go_when_a_buffer_that_they_write_to_has_been_replaced() -> None:
    losses, _, runner = run_on_gpu(as_graphs=True, family="llama", spec=NO_DROPOUT)
    batch = make_batches()[0]
    before = runner.run(batch, num_items=40).item()
    assert runner._graphs
    with torch.no_grad():
        runner.model(torch.randint(5, VOCABULARY, (8, 128), device="cuda"), use_cache=False)
    assert runner.run(batch, num_items=40).item() == before
    assert len(runner._graphs) <= 1
    assert losses


@pytest.mark.gpu
def test_released_graphs_give_their_memory_back() -> None:
    _, _, runner = run_on_gpu(as_graphs=True, family="llama", spec=NO_DROPOUT)
    reserved = torch.cuda.memory_reserved()
    runner.release()
    assert torch.cuda.memory_reserved() < reserved
    assert torch.isfinite(runner.run(make_batches()[0], num_items=40))
