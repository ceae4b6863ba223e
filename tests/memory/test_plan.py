"""The search: what is chosen fits, nothing that fits is faster, and people are told what to do where nothing does."""

from __future__ import annotations

import dataclasses

import pytest

from halfbyte.errors import PlanError
from halfbyte.memory.cards import H100, cpu_of, find_card
from halfbyte.memory.cost_model import CostModel
from halfbyte.memory.ledger import LedgerMaker
from halfbyte.memory.plan import Budget, MemoryPlan, Pins, make_plan
from halfbyte.memory.plan_text import remedies, show_plan, size_of, why_nothing_fits
from halfbyte.memory.run_shape import Choice, RunShape
from tests.memory.shapes import shape_of

GIB = 2**30
RUN = RunShape(batch_rows=8, pages_optimizer=True)


def plan(name: str, gib: float, *, run: RunShape = RUN, host_gib: float = 120, pins: Pins | None = None) -> MemoryPlan:
    budget = Budget(device_bytes=int(gib * GIB), host_bytes=int(host_gib * GIB))
    return make_plan(shape_of(name), run, H100, budget, pins=pins or Pins(rows=4))


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-7B", "Llama-3-8B", "Qwen3-4B", "Llama-13B", "Llama-65B"])
@pytest.mark.parametrize("gib", [4, 8, 12, 24, 80])
def test_what_is_chosen_fits_and_more_memory_is_never_slower(name: str, gib: float) -> None:
    small, large = plan(name, gib), plan(name, gib * 1.5)
    if not small.fits:
        assert small.best.ledger.device_bytes > 0.98 * gib * GIB
        return
    assert small.best.ledger.device_bytes <= 0.98 * gib * GIB
    assert large.fits
    # Plans trade a hundredth of the time against memory that would bring next to nothing.
    assert large.best.time.seconds <= small.best.time.seconds * 1.03
    if small.cheaper is not None:
        assert small.cheaper.ledger.device_bytes < 0.92 * small.best.ledger.device_bytes
    if small.faster is not None:
        assert small.faster.time.seconds < 0.95 * small.best.time.seconds


def test_nothing_that_fits_is_noticeably_faster() -> None:
    found = plan("Llama-7B", 9)
    maker = LedgerMaker(found.shape, RUN, H100)
    costs = CostModel(maker)
    layers = found.shape.layers
    for less, more in (("block", "keep"), ("offload", "keep"), ("mlp", "keep"), ("block", "offload")):
        for count in range(1, layers):
            for streamed in range(0, layers + 1, 4):
                choice = Choice(rows=4, policies=((less, layers - count), (more, count)), streamed_blocks=streamed)
                if maker.make(choice).device_bytes <= 0.98 * 9 * GIB:
                    assert costs.predict(choice).seconds > 0.98 * found.best.time.seconds, choice


def test_enough_memory_means_nothing_visits() -> None:
    choice = plan("Llama-7B", 80).best.choice
    assert choice == Choice(rows=4, policies=(("keep", 32),))


def test_65b_trains_in_8_gib() -> None:
    found = plan("Llama-65B", 8)
    assert found.fits
    assert found.best.choice.streamed_blocks == 80
    assert found.tokens_per_second(found.best) > 1700
    assert not plan("Llama-65B", 8, host_gib=40).fits


def test_the_batch_is_divided_where_that_is_left_to_the_plan() -> None:
    free = plan("Llama-3-8B", 12, pins=Pins())
    assert 8 % free.best.choice.rows == 0
    assert free.best.time.num_micro_batches * free.best.choice.rows == 8
    assert free.best.time.seconds <= plan("Llama-3-8B", 12).best.time.seconds


def test_pins_are_kept() -> None:
    pins = Pins(rows=2, policy="block", streamed_blocks=5, embedding_on_host=True)
    choice = plan("Llama-7B", 24, pins=pins).best.choice
    assert choice == Choice(rows=2, policies=(("block", 32),), streamed_blocks=5, embedding_on_host=True)
    offloaded = plan("Llama-7B", 24, pins=Pins(rows=4, policy="offloaded")).best.choice
    assert offloaded.policies == (("offload", 32),)


def test_a_tied_embedding_stays_on_the_device() -> None:
    assert not plan("Llama-3.2-1B", 3).best.choice.embedding_on_host


def test_a_cpu_has_one_memory() -> None:
    cpu = cpu_of(host_bytes=24 * GIB, cores=2, has_bf16=False)
    run = RunShape(batch_rows=8, compute_bytes=4)
    found = make_plan(shape_of("SmolLM2-135M"), run, cpu, Budget(device_bytes=0, host_bytes=2 * GIB), pins=Pins())
    assert found.fits
    assert found.best.ledger.device_bytes == 0
    assert found.best.choice.streamed_blocks == 0
    assert found.cheaper is None
    assert "device" not in show_plan(found)


def test_the_table_names_every_byte() -> None:
    found = plan("Llama-65B", 8)
    text = show_plan(found)
    ledger = found.best.ledger
    assert sum(entry.device_bytes for entry in ledger.entries) == ledger.device_bytes
    for words in ("in all", "CUDA context", "optimizer state", "visit from host memory", "next cheaper", "next faster"):
        assert words in text
    assert size_of(ledger.device_bytes) in text


def test_guesses_are_called_guesses() -> None:
    card = find_card("RTX 4090")
    budget = Budget(device_bytes=card.memory_bytes, host_bytes=64 * GIB)
    assert "a guess" in show_plan(make_plan(shape_of("Llama-7B"), RUN, card, budget))
    assert "a guess" not in show_plan(plan("Llama-7B", 24))


def test_what_does_not_fit_is_refused_with_what_helps() -> None:
    pins = Pins(rows=8)
    run = dataclasses.replace(RUN, row_tokens=4096, pages_optimizer=False)
    found = plan("Llama-13B", 5, run=run, pins=pins)
    assert not found.fits
    steps = list(remedies(found, pins))
    assert "train.batch_size=8" in steps[0]
    assert "then it fits" in steps[-1]
    assert "1. train.batch_size=8" in str(why_nothing_fits(found, pins))
    hopeless = plan("Llama-65B", 2)
    assert "a card with more memory" in list(remedies(hopeless, Pins(rows=4)))[-1]


SHARED = dataclasses.replace(RUN, ranks=4, host_ranks=4, cards_reach=True)


def test_blocks_are_divided_among_cards_where_host_memory_is_short() -> None:
    divided = plan("Llama-65B", 24, run=SHARED, host_gib=4)
    assert divided.fits
    assert divided.best.choice.home == "cards"
    assert divided.best.ledger.device_bytes <= 0.98 * 24 * GIB
    text = show_plan(divided)
    assert "visit from the cards of this host" in text
    assert "this card's share of" in text
    # Whose cards do not reach each other, or who does not want it, has nothing that fits.
    assert not plan("Llama-65B", 24, run=dataclasses.replace(SHARED, cards_reach=False), host_gib=4).fits
    assert not plan("Llama-65B", 24, run=SHARED, host_gib=4, pins=Pins(rows=4, sharded=False)).fits


def test_a_card_holds_its_share_and_slots_for_what_visits() -> None:
    maker = LedgerMaker(shape_of("Llama-65B"), SHARED, H100)
    choices = {
        home: Choice(rows=4, policies=(("block", 80),), streamed_blocks=78, home=home) for home in ("host", "cards")
    }
    at_home, divided = (maker.make(choices[home]) for home in ("host", "cards"))
    # 78 blocks on four cards: the first two have 20.
    assert divided.device_bytes - at_home.device_bytes == 20 * maker.slab_bytes
    assert at_home.host_bytes - divided.host_bytes == 78 * maker.slab_bytes // 4
    costs = CostModel(maker)
    assert costs.predict(choices["cards"]).seconds <= costs.predict(choices["host"]).seconds


def test_dividing_among_cards_that_cannot_be_is_refused() -> None:
    pins = Pins(rows=4, sharded=True)
    with pytest.raises(PlanError, match="there is one rank on this host"):
        plan("Llama-65B", 24, pins=pins)
    with pytest.raises(PlanError, match="do not read each other's memory"):
        plan("Llama-65B", 24, run=dataclasses.replace(SHARED, cards_reach=False), pins=pins)


def test_unknown_projections_are_refused() -> None:
    with pytest.raises(PlanError, match="not router"):
        RunShape(targets=("q_proj", "router"))


def test_weights_go_to_files_where_host_memory_is_short() -> None:
    run = dataclasses.replace(RUN, may_spill=True)
    spilled = plan("Llama-65B", 8, run=run, host_gib=30)
    assert spilled.fits
    assert spilled.best.choice.home == "files"
    assert spilled.best.ledger.host_bytes < 30 * GIB
    assert "visit from files" in show_plan(spilled)
    assert plan("Llama-65B", 8, run=run).best.choice.home == "host"
    found = plan("Llama-65B", 8, host_gib=30)
    assert not found.fits
    assert any("memory.spill_folder" in step for step in remedies(found, Pins(rows=4)))
