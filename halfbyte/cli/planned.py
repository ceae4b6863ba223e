"""What a plan is made of beside options: a model's configuration, how many cards, and how long its data are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.console import progress_console
from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError, FormatError, PlanError
from halfbyte.memory.model_shape import FUSABLE_TYPES, ModelShape

if TYPE_CHECKING:
    from halfbyte.memory.plan import MemoryPlan


def find_shape(path: str, revision: str | None) -> ModelShape:
    """Return the sizes of a model; see `halfbyte.models.shape.read_shape`, whose libraries take seconds to import.

    A configuration on this machine that tells all its sizes is read without them.

    Raises:
        ConfigError: Nothing is there, or no sizes can be read from it.
        FormatError: It cannot be read.
    """
    found = Path(path).expanduser()
    found = found / "config.json" if found.is_dir() else found
    if found.suffix == ".json" and found.exists():
        try:
            config = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{found} is no JSON: {error}") from error
        if isinstance(config, dict) and config.get("model_type") in FUSABLE_TYPES:
            return ModelShape.from_config(config, name=path)

    from halfbyte.models.shape import read_shape

    return read_shape(path, revision)


def take_gpus(args: argparse.Namespace) -> int:
    """Return how many cards --gpus names, and leave the one card to --gpu.

    Raises:
        ConfigError: It names no number and card.
    """
    if args.gpus is None:
        return 1
    count, _, args.gpu = args.gpus.partition("x")
    if not (count.isdecimal() and int(count) and args.gpu):
        raise ConfigError(f'--gpus is {args.gpus!r}; write a number and a card, such as 2x24GiB or 4x"RTX 4090"')
    return int(count)


def describe_run(config: RunConfig, plan: MemoryPlan) -> str:
    """Return how long a run over the data takes, for which they are read and tokenised."""
    from halfbyte.data import build_renderer
    from halfbyte.models import load_tokenizer, resolve_source
    from halfbyte.train.progress import prepare_examples, read_examples

    options = config.data
    if not config.data.packing:
        raise PlanError("how long a run takes is known for packed rows; leave DATA or data.packing=false out")
    tokenizer = load_tokenizer(resolve_source(config.model.path, config.model.revision))
    renderer = build_renderer(
        tokenizer, chat_template=options.chat_template, system=options.system, train_on=options.train_on
    )
    console = progress_console()
    loaded = read_examples(options.train, options, console)
    prepared = prepare_examples(loaded.examples, renderer, options, console)
    tokens = sum(map(len, prepared.examples))
    rows = -(-tokens // options.max_length)
    steps = config.train.max_steps
    if steps < 0:
        steps = -(-round(rows * config.train.num_train_epochs) // plan.run.batch_rows)
    seconds = steps * plan.best.time.seconds
    time = f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.2g} minutes"
    return (
        f"data: {len(prepared.examples):,} examples, {tokens:,} tokens, about {rows:,} rows; {steps:,} steps take "
        f"about {time}"
    )
