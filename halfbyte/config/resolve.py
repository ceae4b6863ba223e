"""Where a run goes, and whether it goes on with one that was cut short there.

Whatever ended a run - a crash, a signal, a reboot - the same command continues it. Two runs are the same if every
option that decides the result is; those that do not (logging, saving, memory, loader workers) may differ.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from halfbyte.config.describe import Option, list_options
from halfbyte.config.held import is_held
from halfbyte.config.load import load_config
from halfbyte.config.output import (
    RUN_FILE,
    RUNS_FOLDER,
    SUMMARY_FILE,
    folder_stem,
    holds_run,
    last_checkpoint,
    refuse_model_folder,
)
from halfbyte.config.run import RunConfig
from halfbyte.errors import ConfigError

# How long a run is may change where somebody asks for it to go on: state and data order do not depend on it.
LENGTH_OPTIONS = ("train.num_train_epochs", "train.max_steps")
WAYS_OUT = "replace it with --overwrite, or name another folder with --output"


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """An option whose value is not that of the run before."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.before)}, now {_shown(self.now)}"


def resolve_output_dir(config: RunConfig, *, ranks: int = 1) -> RunConfig:
    """Give the run a folder, make sure that it may write there, and find out whether it goes on. Nothing is created.

    Without output_dir it is runs/<model>-<data>-<number>: that of the last run of the same options where it was cut
    short, otherwise the first number that is free; with train.resume=true the last one that is taken.

    Args:
        config: Of the run, as each rank was given it.
        ranks: How many processes train together.

    Returns:
        The config with output_dir set, and train.resume true where there is something to go on from.

    Raises:
        ConfigError: The folder holds a run that is another or complete, a model or is a file; or there is nothing to
            resume.
    """
    resolved = _resolve(_as_one_rank(config, ranks))
    assert resolved.output_dir is not None
    return _with(config, Path(resolved.output_dir), resume=resolved.train.resume)


def _resolve(config: RunConfig) -> RunConfig:
    if config.output_dir is None:
        return _resolve_default(config)
    folder = refuse_model_folder(Path(config.output_dir))
    resume = config.train.resume
    if resume is True:
        _refuse_to_resume(config, folder)
    elif holds_run(folder) and not config.train.overwrite:
        if resume is False or is_finished(folder) or find_run_config(folder) is None:
            raise ConfigError(
                f"{folder} already holds {'a finished' if is_finished(folder) else 'a'} run; {WAYS_OUT}; --resume goes "
                "on with it, for more train.num_train_epochs than it had"
            )
        _refuse_other_options(config, folder, may_differ=())
        resume = True if last_checkpoint(folder) else resume
    return _with(config, folder, resume=resume)


def is_finished(folder: Path) -> bool:
    """Say whether the run in a folder has come to its end."""
    return (folder / SUMMARY_FILE).exists()


def find_run_config(folder: Path) -> RunConfig | None:
    """Return the options of the run in a folder, from its last checkpoint where the folder has lost them.

    Raises:
        ConfigError: They cannot be read.
    """
    places = (folder, last_checkpoint(folder))
    path = next((place / RUN_FILE for place in places if place and (place / RUN_FILE).is_file()), None)
    return None if path is None else load_config(path)


def find_differences(before: RunConfig, now: RunConfig) -> list[Difference]:
    """Return the options that decide the result and differ.

    Args:
        before: As written into run.yaml, where the memory plan has divided train.batch_size.
        now: As asked for, of one rank.
    """
    has_same_rows = now.train.per_device_train_batch_size == before.train.per_device_train_batch_size
    if _rows_of(now) == _rows_of(before) and (has_same_rows or now.train.batch_size is not None):
        now = _divide_alike(before, now)
    options = [option for option in list_options() if option.decides_result]
    pairs = [(option.full_name, value_of(before, option), value_of(now, option)) for option in options]
    return [Difference(name, old, new) for name, old, new in pairs if old != new]


def config_of_all(config: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration of one of several ranks as any number of them can go on with it.

    train.batch_size is that of all together, in micro-batches as before.
    """
    train = config.train
    if ranks == 1:
        return config
    rows = train.batch_size or train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    return dataclasses.replace(config, train=dataclasses.replace(train, batch_size=rows, gradient_accumulation_steps=1))


def divide_for_ranks(before: RunConfig, now: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration of one of several ranks, with train.batch_size in the micro-batches of an earlier run.

    Args:
        before: The earlier run's.
        now: As asked for; without train.batch_size it says how it is divided.
        ranks: How many processes train together.

    Raises:
        ConfigError: They cannot share those micro-batches evenly.
    """
    rows, batch_rows = before.train.per_device_train_batch_size, now.train.batch_size
    if batch_rows is None:
        return now
    if batch_rows % (rows * ranks):
        raise ConfigError(
            f"train.batch_size is {batch_rows}, and the run to go on with has micro-batches of {rows} rows, which "
            f"{ranks} ranks cannot share evenly; go on with fewer ranks"
        )
    train = dataclasses.replace(
        now.train,
        batch_size=None,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batch_rows // (rows * ranks),
    )
    return dataclasses.replace(now, train=train)


def _as_one_rank(config: RunConfig, ranks: int) -> RunConfig:
    """Return what one rank would be asked for to see the same micro-batches in a step."""
    train = config.train
    if train.batch_size is not None:
        return config
    turns = train.gradient_accumulation_steps * ranks
    return dataclasses.replace(config, train=dataclasses.replace(train, gradient_accumulation_steps=turns))


def _rows_of(config: RunConfig) -> int:
    train = config.train
    return train.batch_size or train.per_device_train_batch_size * train.gradient_accumulation_steps


def _divide_alike(before: RunConfig, now: RunConfig) -> RunConfig:
    """Return `now` with its batch divided into the micro-batches of `before`."""
    train = dataclasses.replace(
        now.train,
        batch_size=before.train.batch_size,
        per_device_train_batch_size=before.train.per_device_train_batch_size,
        gradient_accumulation_steps=before.train.gradient_accumulation_steps,
    )
    return dataclasses.replace(now, train=train)


def value_of(config: RunConfig, option: Option) -> Any:
    """Return the value of an option."""
    section = getattr(config, option.section) if option.section else config
    return getattr(section, option.name)


def _resolve_default(config: RunConfig) -> RunConfig:
    stem = f"{folder_stem(config.model.path)}-{folder_stem(config.data.train)}"
    numbers = [
        int(path.name.removeprefix(f"{stem}-"))
        for path in RUNS_FOLDER.glob("*")
        if re.fullmatch(re.escape(stem) + r"-\d+", path.name)
    ]
    last = RUNS_FOLDER / f"{stem}-{max(numbers, default=0)}"
    if config.train.resume is True:
        _refuse_to_resume(config, last)
        return _with(config, last, resume=True)
    if numbers and config.train.resume == "auto" and not config.train.overwrite and _goes_on(config, last):
        return _with(config, last, resume=True)
    folder = refuse_model_folder(RUNS_FOLDER / f"{stem}-{max(numbers, default=0) + 1}")
    return _with(config, folder, resume=config.train.resume)


def _goes_on(config: RunConfig, folder: Path) -> bool:
    """Say whether a folder holds a run of the same options that was cut short and that nobody trains."""
    before = None if is_finished(folder) or last_checkpoint(folder) is None else find_run_config(folder)
    return before is not None and not find_differences(before, config) and not is_held(folder)


def _refuse_to_resume(config: RunConfig, folder: Path) -> None:
    if last_checkpoint(folder) is None:
        raise ConfigError(f"train.resume: {folder} holds no checkpoint; leave --resume out to start a run there")
    _refuse_other_options(config, folder, may_differ=LENGTH_OPTIONS)


def _refuse_other_options(config: RunConfig, folder: Path, *, may_differ: Collection[str]) -> None:
    before = find_run_config(folder)
    differences = [] if before is None else find_differences(before, config)
    refused = [difference for difference in differences if difference.name not in may_differ]
    if refused:
        raise ConfigError(
            f"{folder} holds a run with other options: {'; '.join(map(str, refused))}. To go on with it, give these as "
            f"they were (halfbyte train {folder / RUN_FILE}); otherwise {WAYS_OUT}"
        )


def _with(config: RunConfig, folder: Path, *, resume: Any) -> RunConfig:
    train = dataclasses.replace(config.train, resume=resume)
    return dataclasses.replace(config, train=train, output_dir=str(folder))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
