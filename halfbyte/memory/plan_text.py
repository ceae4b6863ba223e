"""A plan for people: the table of bytes by purpose, what was chosen and why, and what to change where nothing fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from halfbyte.errors import PlanError
from halfbyte.memory.activation_policy import Policy, describe_policies
from halfbyte.memory.cost_model import CostModel
from halfbyte.memory.ledger import LedgerMaker
from halfbyte.memory.plan import NO_PINS, Candidate, MemoryPlan, Pins, make_plan
from halfbyte.memory.run_shape import Home, RunShape

GIB, MIB = 2**30, 2**20
MIN_ROW_TOKENS, MIN_RANK = 128, 4
# Rows below it are added up.
SMALL_SHARE = 0.004
POLICY_WORDS: dict[Policy, str] = {
    "keep": "kept",
    "mlp": "kept but for gate and up",
    "offload": "put away into host memory",
    "block": "computed again",
}
HOME_WORDS: dict[Home, str] = {
    "host": "host memory",
    "files": "files",
    "cards": "the cards of this host, among which they are divided",
}
SHARE_WORDS: dict[Home, str] = {
    "host": "a share in one host copy",
    "files": "a share in one copy in files",
    "cards": "its share of the others",
}
WAY_WORDS: dict[Home, str] = {
    "host": "host and device exchange data",
    "files": "the disk gives weights",
    "cards": "cards exchange data",
}
CPU_GUESS = "a guess from the number of cores"
GUESS = "scaled from an H100 by data sheets: a guess, within a third or so"


def size_of(num_bytes: float) -> str:
    """Return bytes for people."""
    if num_bytes >= 99.5 * MIB:
        return f"{num_bytes / GIB:.2f} GiB" if num_bytes < 100 * GIB else f"{num_bytes / GIB:.0f} GiB"
    return f"{num_bytes / MIB:.0f} MiB"


def show_plan(plan: MemoryPlan) -> str:
    """Return the whole plan, as lines."""
    lines = [describe_task(plan), *_table(plan), *describe_choice(plan, plan.best), describe_speed(plan)]
    if plan.card.is_gpu:
        lines.append(f"next cheaper: {_describe_other(plan, plan.cheaper)}")
    lines.append(f"next faster: {_describe_other(plan, plan.faster)}")
    return "\n".join(lines)


def describe_task(plan: MemoryPlan) -> str:
    """Return what is planned for what."""
    shape, run, card = plan.shape, plan.run, plan.card
    bits = "in 4 bits" if run.in_4bit else f"in {8 * run.compute_bytes} bits"
    place = f"{card.name}, {size_of(plan.budget.device_bytes)} of it, and " if card.is_gpu else f"{card.name}, "
    return (
        f"plan: {shape.name}, {shape.num_parameters / 1e9:.3g} billion weights {bits}, rank {run.rank}; "
        f"{run.ranks * run.batch_rows} x {run.row_tokens} tokens a step, on "
        f"{f'each of {run.ranks}: ' if run.ranks > 1 else ''}{place}{size_of(plan.budget.host_bytes)} of host memory"
    )


def describe_choice(plan: MemoryPlan, candidate: Candidate) -> list[str]:
    """Return what a candidate does, a line for each kind of choice."""
    choice, run = candidate.choice, plan.run
    micro_batches = -(-run.batch_rows // choice.rows)
    parts = [f"micro-batch: {choice.rows} x {run.row_tokens} tokens, {micro_batches} a step"]
    if choice.streamed_blocks:
        source = HOME_WORDS[choice.home]
        parts.append(f"weights: {choice.streamed_blocks} of {plan.shape.layers} blocks visit from {source}")
    elif plan.card.is_gpu:
        parts.append("weights: all on the device")
    if choice.embedding_on_host:
        parts.append("embedding: in host memory")
    if run.ranks > 1:
        has = (
            "the whole base" if not choice.streamed_blocks else f"the blocks that stay, and {SHARE_WORDS[choice.home]}"
        )
        costs = CostModel(LedgerMaker(plan.shape, run, plan.card))
        parts.append(
            f"ranks: each of {run.ranks} has {has}; gradients are added up once a step beside its last backward, "
            f"{size_of(costs.exchange_bytes)} in {1e3 * costs.exchange_seconds:.0f} ms at {run.peer_gbps:g} GB/s"
        )
    if run.fused:
        parts.append(f"activations: {describe_policies(choice.policy_of_blocks, POLICY_WORDS)}")
    else:
        kept = choice.policies[0][0] == "keep"
        parts.append(f"activations: {'all kept' if kept else 'computed again'} (path for any architecture)")
    return parts


def describe_speed(plan: MemoryPlan) -> str:
    """Return the predicted speed."""
    time = plan.best.time
    way = WAY_WORDS[plan.best.choice.home]
    bound = f", as fast as {way}" if time.link_bound else ""
    trust = "" if plan.card.is_measured else f" ({GUESS if plan.card.is_gpu else CPU_GUESS})"
    return f"speed: about {_speed(plan, plan.best)}, {time.seconds:.3g} s a step{bound}{trust}"


def as_record(plan: MemoryPlan) -> dict[str, Any]:
    """Return a plan for programs; bytes, seconds and tokens a second."""
    candidates = {"best": plan.best, "cheaper": plan.cheaper, "faster": plan.faster}
    return {
        "model": dataclasses.asdict(plan.shape),
        "run": dataclasses.asdict(plan.run),
        "card": dataclasses.asdict(plan.card),
        "budget": dataclasses.asdict(plan.budget),
        "fits": plan.fits,
        **{
            name: None
            if one is None
            else {
                "choice": dataclasses.asdict(one.choice),
                "entries": [dataclasses.asdict(entry) for entry in one.ledger.entries],
                "device_bytes": one.ledger.device_bytes,
                "reserved_bytes": one.ledger.reserved_bytes,
                "host_bytes": one.ledger.host_bytes,
                "step_seconds": one.time.seconds,
                "tokens_per_second": plan.tokens_per_second(one),
            }
            for name, one in candidates.items()
        },
    }


def why_nothing_fits(plan: MemoryPlan, pins: Pins = NO_PINS) -> PlanError:
    """Return the error that says what is missing, and what to change, from what hurts least."""
    need, have = plan.best.ledger, plan.budget
    if plan.card.is_gpu:
        lacks = f"it takes at least {size_of(need.device_bytes)} of the device's {size_of(have.device_bytes)}"
        if need.host_bytes > have.host_bytes:
            lacks += f", and {size_of(need.host_bytes)} of host memory, of which {size_of(have.host_bytes)} are free"
    else:
        lacks = f"it takes at least {size_of(need.host_bytes)} of memory, and {size_of(have.host_bytes)} are free"
    steps = "\n".join(f"  {number}. {text}" for number, text in enumerate(remedies(plan, pins), 1))
    return PlanError(f"{plan.shape.name} does not fit: {lacks}.\nWhat helps, each on top of those before it:\n{steps}")


def remedies(plan: MemoryPlan, pins: Pins) -> Iterator[str]:
    """Yield what to change, each change beside those before it, until it fits."""
    run = plan.run
    for text, run_, pins_ in _changes(run, pins, is_gpu=plan.card.is_gpu):
        changed = make_plan(plan.shape, run_, plan.card, plan.budget, pins=pins_)
        ledger = changed.best.ledger
        needs = f"{size_of(ledger.device_bytes)} and " if plan.card.is_gpu else ""
        if changed.fits:
            yield f"{text}: then it fits, at about {_speed(changed, changed.best)}"
            return
        yield f"{text}: then at least {needs}{size_of(ledger.host_bytes)} of host memory"
    yield f"a smaller model, or a {'card' if plan.card.is_gpu else 'machine'} with more memory"


def _changes(run: RunShape, pins: Pins, *, is_gpu: bool) -> Iterator[tuple[str, RunShape, Pins]]:
    if pins.rows is not None and pins.rows > 1:
        pins = dataclasses.replace(pins, rows=None)
        yield f"train.batch_size={run.batch_rows}, so that the plan divides the batch (same result)", run, pins
    if pins != NO_PINS and pins != Pins(rows=pins.rows):
        pins = Pins(rows=pins.rows)
        yield "leave train.gradient_checkpointing and the memory section to the plan", run, pins
    if is_gpu and not run.pages_optimizer:
        run = dataclasses.replace(run, pages_optimizer=True)
        yield "train.optim=paged_adamw_8bit", run, pins
    elif run.state_bits == 32:
        run = dataclasses.replace(run, state_bits=8)
        yield "train.optim=adamw_8bit", run, pins
    if is_gpu and run.in_4bit and not run.may_spill:
        run = dataclasses.replace(run, may_spill=True)
        yield "memory.spill_folder=FOLDER on a fast disk, for weights that host memory has no room for", run, pins
    while run.row_tokens // 2 >= MIN_ROW_TOKENS:
        run = dataclasses.replace(run, row_tokens=run.row_tokens // 2)
        yield f"data.max_length={run.row_tokens}", run, pins
    if run.rank > MIN_RANK:
        run = dataclasses.replace(run, rank=max(MIN_RANK, run.rank // 4))
        yield f"lora.rank={run.rank}", run, pins


def _table(plan: MemoryPlan) -> list[str]:
    ledger, is_gpu = plan.best.ledger, plan.card.is_gpu
    total = ledger.device_bytes + ledger.host_bytes
    large = [entry for entry in ledger.entries if entry.device_bytes + entry.host_bytes >= SMALL_SHARE * total]
    small = [entry for entry in ledger.entries if entry not in large]
    rows = [(entry.purpose, entry.device_bytes, entry.host_bytes, entry.note) for entry in large]
    rows.append(("smaller parts", sum(e.device_bytes for e in small), sum(e.host_bytes for e in small), ""))
    rows.append(("in all", ledger.device_bytes, ledger.host_bytes, ""))
    width = max(len(purpose) for purpose, *_ in rows)
    lines = [f"{'':{width}}" + (f"  {'device':>10}" if is_gpu else "") + f"  {'host':>10}"]
    for purpose, device, host, note in rows:
        sizes = ([device] if is_gpu else []) + [host]
        cells = "".join(f"  {size_of(size) if size else '':>10}" for size in sizes)
        lines.append(f"{purpose:{width}}{cells}  {note}".rstrip())
    return lines


def _describe_other(plan: MemoryPlan, other: Candidate | None) -> str:
    if other is None:
        return "none"
    taken = other.ledger.device_bytes if plan.card.is_gpu else other.ledger.host_bytes
    return f"{size_of(taken)}, about {_speed(plan, other)}, with {'; '.join(describe_choice(plan, other))}"


def _speed(plan: MemoryPlan, candidate: Candidate) -> str:
    speed = plan.tokens_per_second(candidate)
    digits = max(0, 2 - math.floor(math.log10(speed)))
    rounded = round(speed, digits) if digits else round(speed, 2 - math.floor(math.log10(speed)))
    return f"{rounded:,.{digits}f} tokens/s" if speed < 100 else f"{rounded:,.0f} tokens/s"
