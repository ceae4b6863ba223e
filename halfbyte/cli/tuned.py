"""What a person means by OUT: the folder of a run, a PEFT adapter, or a plain model; found, then loaded.

A run says in run.yaml how its base was held, and chat, generate and eval hold it the same way. An adapter made
elsewhere names its base in adapter_config.json. A folder without an adapter is a model of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config import QuantSection, RunConfig
from halfbyte.config.load import make_config, parse_overrides, read_yaml
from halfbyte.config.output import RUN_FILE
from halfbyte.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.quant import QuantSpec

RUN_DEFAULTS = "The options below are as the run had them, unless given here; defaults are those of a run."
# Options of how examples are read, for commands that take examples.
READING = tuple(
    f"data.{name}"
    for name in ("split", "format", "columns", "system", "chat_template", "train_on", "max_length", "overlong")
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TunedSource:
    """A base model and the adapter for it."""

    config: RunConfig
    """How the base is held and examples are read; data.train is empty where no run tells."""
    adapter: Path | None
    tokenizer: Path | None
    """Folder of a tokenizer that came with the adapter; None for the base's own."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TunedModel:
    """The same, loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_adapter: bool


def find_tuned(name: str, overrides: Mapping[str, str]) -> TunedSource:
    """Return what `name` is: a run, an adapter or a model.

    Args:
        name: Folder of a run, folder or file of an adapter; or folder, file or hub id of a model.
        overrides: Options from the command line, which win over the run's own.

    Raises:
        ConfigError: An adapter that names no base, or a folder that holds neither adapter nor model.
    """
    folder = Path(name).parent if Path(name).name in ADAPTER_FILES else Path(name)
    has_adapter = (folder / "adapter_config.json").exists()
    given = parse_overrides(overrides)
    values: dict[str, Any] = {"data.train": ""}
    if (folder / RUN_FILE).exists():
        if not has_adapter:
            raise ConfigError(
                f"{folder} holds a run that has not left an adapter; end it with halfbyte train {folder / RUN_FILE}"
            )
        values |= read_yaml(folder / RUN_FILE)
    elif has_adapter:
        values |= _base_of_adapter(folder / "adapter_config.json")
    else:
        if folder.is_dir() and not (folder / "config.json").exists():
            raise ConfigError(f"{folder} holds no run, adapter or model")
        values |= {"model.path": name, "quant.enabled": False}
    if "model.dtype" in given:
        values = {name: value for name, value in values.items() if name not in ("train.bf16", "train.fp16")}
    if "model.path" not in values | given:
        raise ConfigError(f"{folder / 'adapter_config.json'} names no base model; name it with --model.path=MODEL")
    has_tokenizer = has_adapter and (folder / "tokenizer_config.json").exists()
    return TunedSource(
        config=make_config(values | given),
        adapter=folder if has_adapter else None,
        tokenizer=folder if has_tokenizer else None,
    )


def load_tuned(source: TunedSource, *, console: Console, name: str = "default") -> TunedModel:
    """Load base, adapter (under a name) and tokenizer, telling `console` what was found."""
    from halfbyte.device import keep_freed_memory
    from halfbyte.models import load_adapter, load_model
    from halfbyte.models.attention import PACKED_ATTENTION
    from halfbyte.models.weight_splits import stored_splits

    options = source.config.model
    quant = quant_spec(source.config.quant)
    with console.status(f"loading {options.path}"):
        loaded = load_model(
            options.path,
            quant=quant,
            compute_dtype=source.config.compute_dtype,
            device=options.device,
            allow_16bit_experts=options.allow_16bit_experts,
            attn_implementation=options.attention or PACKED_ATTENTION,
            revision=options.revision,
            splits=stored_splits(source.adapter, quant),
        )
    console.print(str(loaded.report), markup=False)
    if source.adapter is not None:
        report = load_adapter(loaded.model, source.adapter, name=name, splits=loaded.splits)
        console.print(str(report), markup=False)
    if loaded.report.device.type == "cpu":
        keep_freed_memory()
    return TunedModel(
        model=loaded.model,
        tokenizer=dataclasses.replace(loaded, tokenizer_folder=source.tokenizer).tokenizer,
        has_adapter=source.adapter is not None,
    )


def find_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, or one that lies in a folder without a model, as a run leaves it."""
    from halfbyte.models import ModelSource, load_tokenizer, resolve_source

    folder = Path(name)
    if (folder / "tokenizer_config.json").exists():
        return load_tokenizer(ModelSource(kind="safetensors", name=name, folder=folder, weight_files=()))
    return load_tokenizer(resolve_source(name, revision))


def quant_spec(options: QuantSection) -> QuantSpec | None:
    """Return how to quantise, or None where the options say not to."""
    from halfbyte.quant import QuantSpec

    if not options.enabled:
        return None
    return QuantSpec(codebook=options.codebook, block_size=options.block_size, double_quant=options.double_quant)


def _base_of_adapter(path: Path) -> dict[str, Any]:
    """Return what an adapter's configuration says of its base, as options."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        named = {"model.path": config.get("base_model_name_or_path"), "model.revision": config.get("revision")}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise FormatError(f"{path} is no adapter configuration: {error}") from None
    return {name: str(value) for name, value in named.items() if value}
