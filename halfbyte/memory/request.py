"""What a run's configuration asks of a plan."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from halfbyte.config import RunConfig
from halfbyte.config.adapter_init import alters_base
from halfbyte.device import ALLOCATOR_VARIABLES, EXPANDABLE_SEGMENTS
from halfbyte.errors import ConfigError, PlanError
from halfbyte.memory.activation_policy import Policy
from halfbyte.memory.model_shape import PROJECTIONS
from halfbyte.memory.plan import MemoryPlan, Pins
from halfbyte.memory.run_shape import RunShape

ALL_LINEAR = "all-linear"
WORD_MODULES = ("embed_tokens", "lm_head")
TEMPLATE_TOKENS = 8
STATE_32_BITS = ("paged_adamw_32bit", "adamw_torch", "adamw_torch_fused")


def run_shape_of(
    config: RunConfig,
    *,
    compute_bytes: Literal[2, 4],
    expandable_segments: bool = True,
    is_fusable: bool = True,
    ranks: int = 1,
    host_ranks: int = 1,
    cards_reach: bool = False,
) -> RunShape:
    """Return what a configuration asks for.

    Args:
        config: Of the run.
        compute_bytes: Of a number in the dtype that products will run in.
        expandable_segments: Whether torch's allocator may grow its segments.
        is_fusable: Whether fused blocks compute the model's layers, unless they are off.
        ranks: Processes that train together; the configuration is that of one.
        host_ranks: Of them, those on one host.
        cards_reach: Whether these read the memory of each other's cards.

    Raises:
        PlanError: It asks for what no plan knows the size of.
    """
    train, lora = config.train, config.lora
    unknown = [name for name in lora.modules_to_save if name not in WORD_MODULES]
    if unknown:
        raise PlanError(f"modules trained whole (lora.modules_to_save) are not planned for: {', '.join(unknown)}")
    if lora.adapter is not None:
        raise PlanError("the size of an adapter to continue from (lora.adapter) is not planned for")
    return RunShape(
        row_tokens=config.data.max_length,
        batch_rows=batch_rows_of(config),
        ranks=ranks,
        host_ranks=host_ranks,
        cards_reach=cards_reach,
        rank=max(lora.rank, *lora.rank_pattern.values()) if lora.rank_pattern else lora.rank,
        dora=lora.dora,
        keeps_first=alters_base(lora.init, lora.loftq_iterations),
        targets=_targets_of(lora.targets),
        in_4bit=config.quant.enabled,
        block_size=config.quant.block_size,
        double_quant=config.quant.double_quant,
        compute_bytes=compute_bytes,
        state_bits=32 if train.optim in STATE_32_BITS else 8,
        pages_optimizer=train.optim.startswith("paged"),
        drops=lora.dropout > 0,
        fp8=train.fp8,
        fused=train.fused and is_fusable and not lora.dora,
        expandable_segments=expandable_segments,
        token_rows=_token_rows_of(config),
        trained_whole=lora.modules_to_save,
        may_spill=config.memory.spill_folder is not None,
    )


def share_of_batch(config: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration of one of several ranks: train.batch_size is that of all together.

    Raises:
        ConfigError: They cannot share it evenly.
    """
    rows = config.train.batch_size
    if ranks == 1 or rows is None:
        return config
    if rows % ranks:
        raise ConfigError(f"train.batch_size is {rows}, which {ranks} ranks cannot share; choose a multiple")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows // ranks))


def batch_rows_of(config: RunConfig) -> int:
    """Return the rows of an optimizer step."""
    train = config.train
    return train.batch_size or train.per_device_train_batch_size * train.gradient_accumulation_steps


def pins_of(config: RunConfig) -> Pins:
    """Return what a configuration has chosen already."""
    wanted = config.train.gradient_checkpointing
    policies: dict[bool | str, Policy | Literal["offloaded"] | None] = {
        True: "block",
        False: "keep",
        "offload": "offloaded",
        "auto": None,
    }
    return Pins(
        rows=None if config.train.batch_size else config.train.per_device_train_batch_size,
        policy=policies[wanted],
        streamed_blocks=config.memory.streamed_blocks,
        embedding_on_host=config.memory.embedding_on_host,
        sharded=config.memory.sharded,
    )


def planned_config(config: RunConfig, plan: MemoryPlan) -> RunConfig:
    """Return a configuration with what a plan chose for the batch."""
    rows = plan.best.choice.rows
    train = dataclasses.replace(
        config.train,
        batch_size=None,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=plan.run.batch_rows // rows,
    )
    return dataclasses.replace(config, train=train)


def has_expandable_segments() -> bool:
    """Say whether torch's allocator was told that it may grow its segments."""
    return any(EXPANDABLE_SEGMENTS in os.environ.get(name, "") for name in ALLOCATOR_VARIABLES)


def _token_rows_of(config: RunConfig) -> int:
    """Return the tokens whose rows are trained: of a template's markers a handful, before the tokenizer is read."""
    added = config.model.added_tokens
    return len(config.lora.trainable_token_indices) + (TEMPLATE_TOKENS if isinstance(added, str) else len(added))


def _targets_of(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the projections with adapters; all of them, the most there can be, where an expression decides."""
    if isinstance(targets, str):
        return PROJECTIONS
    known = tuple(name for name in PROJECTIONS if any(target.split(".")[-1] == name for target in targets))
    return known or PROJECTIONS
