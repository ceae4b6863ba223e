"""Everything that a run's report shows, as plain values."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from halfbyte import __version__
from halfbyte.config import RunConfig
from halfbyte.config.load import lasting_config
from halfbyte.data import DataReport
from halfbyte.device import Machine, describe_machine, installed_version
from halfbyte.memory.plan import MemoryPlan
from halfbyte.train.summary import Summary
from halfbyte.train.trainer import HalfbyteTrainer

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "triton")
# The plan's rows that torch's figures, which are those measured, leave out.
UNMEASURED = ("CUDA context",)


class Part(NamedTuple):
    """Planned memory of one purpose."""

    purpose: str
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run that has ended."""

    name: str
    """Of its folder."""
    folder: Path
    config: RunConfig
    summary: Summary
    history: tuple[Mapping[str, float], ...]
    """What was logged, in order, each entry with its step."""
    data: DataReport
    """Of the examples that it learned."""
    planned: tuple[Part, ...]
    """Memory by purpose, largest first: of the GPU where there is one; empty without a plan."""
    machine: Machine
    versions: Mapping[str, str]


def make_record(
    trainer: HalfbyteTrainer,
    summary: Summary,
    *,
    config: RunConfig,
    folder: Path,
    data: DataReport,
    plan: MemoryPlan | None,
) -> RunRecord:
    """Collect what there is to show of a trainer that has trained."""
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        config=lasting_config(config),
        summary=summary,
        history=tuple(trainer.state.log_history),
        data=data,
        planned=() if plan is None else planned_parts(plan),
        machine=describe_machine(),
        versions=list_versions(),
    )


def planned_parts(plan: MemoryPlan) -> tuple[Part, ...]:
    """Return what a plan takes of the memory that is measured: the GPU's or, without one, the host's."""
    sizes = [
        Part(entry.purpose, entry.device_bytes if plan.card.is_gpu else entry.host_bytes)
        for entry in plan.best.ledger.entries
        if entry.purpose not in UNMEASURED
    ]
    return tuple(sorted((part for part in sizes if part.num_bytes), key=lambda part: -part.num_bytes))


def list_versions() -> dict[str, str]:
    """Return the versions of what computes; libraries that are not installed are left out."""
    found = {name: installed_version(name) for name in LIBRARIES}
    return {
        "halfbyte": __version__,
        **{name: version for name, version in found.items() if version is not None},
        "Python": platform.python_version(),
        "system": platform.platform(terse=True),
    }
