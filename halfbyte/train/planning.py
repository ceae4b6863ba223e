"""The plan of a run on this machine: made before anything is loaded, printed, and then followed.

A plan needs the model's sizes, which config.json gives, and what is free here. A model whose sizes cannot be read so is
trained without one: everything on the device, micro-batches as asked for, activations by what is measured to fit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from halfbyte.config import RunConfig
from halfbyte.config.resolve import divide_for_ranks, find_run_config
from halfbyte.device import free_bytes, resolve_compute_dtype
from halfbyte.distributed import current_world
from halfbyte.errors import ConfigError, PlanError
from halfbyte.memory.activation_policy import Policy
from halfbyte.memory.cards import CONTEXT_BYTES, Card
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.peer_memory import reach_each_other
from halfbyte.memory.plan import Budget, MemoryPlan, Pins, cannot_divide, make_plan
from halfbyte.memory.plan_text import show_plan, size_of, why_nothing_fits
from halfbyte.memory.request import (
    batch_rows_of,
    has_expandable_segments,
    pins_of,
    planned_config,
    run_shape_of,
    share_of_batch,
)
from halfbyte.memory.this_machine import card_of
from halfbyte.models.shape import read_shape
from halfbyte.models.streaming import Residency

# A plan may err by so much: beyond it, what does not fit by plan is refused.
TOLERANCE = 0.05
# Other programs want host memory too.
USABLE_HOST_SHARE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What follows from a plan, or from there being none."""

    config: RunConfig
    """With micro-batches as planned."""
    residency: Residency
    policies: tuple[Policy, ...] | None
    """What each block keeps; None leaves it to the trainer."""
    text: str
    """For people."""
    plan: MemoryPlan | None
    """None where none could be made."""


def plan_run(config: RunConfig, device: torch.device) -> PlannedRun:
    """Plan a run, and hold the allocator to the memory that it may take.

    Args:
        config: Of the run.
        device: Where it computes.

    Raises:
        PlanError: It does not fit by any plan.
        ConfigError: The model's configuration cannot be read.
    """
    world = current_world()
    config = share_of_batch(_like_the_run_before(config), world.size)
    card = card_of(device)
    budget = _measure_budget(config, device, card)
    cards_reach = reach_each_other(world, device)
    if device.type == "cuda" and config.memory.gpu_bytes is not None:
        allowed = max(config.memory.gpu_bytes - card.context_bytes, 0)
        torch.cuda.set_per_process_memory_fraction(min(allowed / card.memory_bytes, 1.0), device.index or 0)
    try:
        shape = _read_shape(config)
        computing = resolve_compute_dtype(config.compute_dtype, device).dtype
        run = run_shape_of(
            config,
            compute_bytes=4 if computing.itemsize == 4 else 2,
            expandable_segments=has_expandable_segments(),
            is_fusable=shape.is_fusable,
            ranks=world.size,
            host_ranks=world.local_size,
            cards_reach=cards_reach,
        )
    except PlanError as error:
        if config.memory.sharded and not (cards_reach and world.local_size > 1):
            raise cannot_divide(host_ranks=world.local_size) from error
        return _unplanned(config, str(error))
    pins = pins_of(config)
    plan = make_plan(shape, run, card, budget, pins=pins)
    _refuse_what_cannot_fit(plan, pins)
    choice = plan.best.choice
    return PlannedRun(
        config=planned_config(config, plan),
        residency=Residency(
            streamed_blocks=choice.streamed_blocks,
            embedding_on_host=choice.embedding_on_host,
            spill_folder=_spill_folder(config) if choice.home == "files" else None,
            on_cards=choice.home == "cards",
        ),
        policies=choice.policy_of_blocks if run.fused else None,
        text=show_plan(plan),
        plan=plan,
    )


def _measure_budget(config: RunConfig, device: torch.device, card: Card) -> Budget:
    world = current_world()
    on_host = int(free_bytes(torch.device("cpu")) * USABLE_HOST_SHARE) // world.local_size
    on_device = 0
    if card.is_gpu:
        # What is free is so beside the context that asking has made.
        on_device = min(free_bytes(device) + CONTEXT_BYTES, card.memory_bytes)
    # All ranks must come to the same plan, and the poorest decides.
    on_device, on_host = map(int, world.min(on_device, on_host))
    return Budget(
        device_bytes=min(on_device, config.memory.gpu_bytes or on_device),
        host_bytes=min(on_host, config.memory.host_bytes or on_host),
    )


def _read_shape(config: RunConfig) -> ModelShape:
    try:
        return read_shape(config.model.path, config.model.revision)
    except ConfigError as error:
        raise PlanError(str(error)) from error


def _refuse_what_cannot_fit(plan: MemoryPlan, pins: Pins) -> None:
    if plan.fits:
        return
    need, have = plan.best.ledger, plan.budget
    if need.device_bytes > have.device_bytes * (1 + TOLERANCE) or need.host_bytes > have.host_bytes * (1 + TOLERANCE):
        raise why_nothing_fits(plan, pins)


def _unplanned(config: RunConfig, why: str) -> PlannedRun:
    rows = batch_rows_of(config)
    train = config.train
    if train.batch_size is not None:
        per_device = min(train.per_device_train_batch_size, rows)
        if rows % per_device:
            raise ConfigError(
                f"train.batch_size is {rows}, and there is no plan to divide it ({why}); set "
                "train.per_device_train_batch_size to a divisor"
            )
        train = dataclasses.replace(
            train,
            batch_size=None,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=rows // per_device,
        )
    memory = config.memory
    return PlannedRun(
        config=dataclasses.replace(config, train=train),
        residency=Residency(
            streamed_blocks=memory.streamed_blocks or 0,
            embedding_on_host=bool(memory.embedding_on_host),
            spill_folder=_spill_folder(config),
            on_cards=bool(memory.sharded),
        ),
        policies=None,
        text=f"no memory plan: {why}" + (f"; held to {size_of(memory.gpu_bytes)}" if memory.gpu_bytes else ""),
        plan=None,
    )


def _spill_folder(config: RunConfig) -> Path | None:
    folder = config.memory.spill_folder
    return None if folder is None else Path(folder).expanduser()


def _like_the_run_before(config: RunConfig) -> RunConfig:
    """Divide the batch as the run that is continued did: its checkpoint goes on bit for bit only so."""
    if config.train.resume is not True or config.output_dir is None:
        return config
    before = find_run_config(Path(config.output_dir))
    return config if before is None else divide_for_ranks(before, config, current_world().size)
