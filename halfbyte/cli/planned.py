"""What a plan is made of beside options: a model's configuration, and how long its data are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.config import RunConfig
from halfbyte.errors import FormatError, PlanError
from halfbyte.memory.model_shape import FUSABLE_TYPES, ModelShape

if TYPE_CHECKING:
    from halfbyte.memory.plan import MemoryPlan


def read_shape(path: str, revision: str | None) -> ModelShape:
    """Return the sizes of a model; of a hub id only config.json is downloaded.

    Raises:
        ConfigError: Nothing is there, or no sizes can be read from it.
        FormatError: It cannot be read.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        found = found / "config.json"
        if not found.exists():
            raise FormatError(f"{found} is missing")
    if found.suffix == ".json" and found.exists():
        try:
            config = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{found} is no JSON: {error}") from error
        if not isinstance(config, dict):
            raise FormatError(f"{found} holds no JSON object")
        # What tells all its sizes needs no transformers, which takes seconds to import.
        if config.get("model_type") in FUSABLE_TYPES:
            return ModelShape.from_config(config, name=path)

    from transformers import AutoConfig

    from halfbyte.models.describe import load_config
    from halfbyte.models.hub import download_file, is_hub_file, is_hub_id
    from halfbyte.models.shape import shape_of
    from halfbyte.models.source import resolve_source

    if not found.exists() and is_hub_id(path) and not is_hub_file(path):
        found = download_file(f"{path}/config.json", revision)
    if found.suffix == ".json":
        return shape_of(AutoConfig.from_pretrained(found.parent), name=path)
    return shape_of(load_config(resolve_source(path, revision)), name=path)


def describe_run(config: RunConfig, plan: MemoryPlan) -> str:
    """Return how long a run over the data takes, for which they are read and tokenised."""
    from halfbyte.data import build_renderer, load_examples, prepare
    from halfbyte.models import load_tokenizer, resolve_source

    options = config.data
    if not config.data.packing:
        raise PlanError("how long a run takes is known for packed rows; leave DATA or data.packing=false out")
    tokenizer = load_tokenizer(resolve_source(config.model.path, config.model.revision))
    renderer = build_renderer(
        tokenizer, chat_template=options.chat_template, system=options.system, train_on=options.train_on
    )
    loaded = load_examples(options.train, format=options.format, columns=options.columns, split=options.split)
    prepared = prepare(loaded.examples, renderer, max_length=options.max_length, overlong=options.overlong)
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
