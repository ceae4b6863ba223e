"""Going on from an earlier adapter: its weights and its configuration, a new optimizer.

What the run's own options say of the adapters must not contradict the file: a rank that is asked for and not had would
be a run that does something else than was written down. An option that has its default asks for nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from halfbyte.config import LoraSection, RunConfig
from halfbyte.config.output import RUN_FILE
from halfbyte.errors import ConfigError
from halfbyte.models.adapter_config import read_adapter_config, spec_from_adapter_config
from halfbyte.models.adapter_files import find_adapter_weights
from halfbyte.models.run_folder import load_run_quant
from halfbyte.nn import LoraSpec
from halfbyte.nn.targets import find_targets

# Options that decide how training goes on, or that are about the file itself.
_FREE = {"adapter", "dropout"}
_TARGETS = {"targets", "exclude", "layers_to_transform", "layers_pattern"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EarlierAdapter:
    """An adapter to go on with."""

    weights: Path
    spec: LoraSpec
    tokenizer: Path | None
    """Folder of the tokenizer it was trained with, where that lies beside it."""
    notes: tuple[str, ...]


def find_earlier(config: RunConfig) -> EarlierAdapter | None:
    """Return the adapter that a run goes on with, after checking that it is for this base; None for a new one.

    Raises:
        ConfigError: It was trained on another base, or options contradict it.
        FormatError: There is none.
    """
    if config.lora.adapter is None:
        return None
    weights = find_adapter_weights(Path(config.lora.adapter))
    values = read_adapter_config(weights)
    spec = spec_from_adapter_config(values)
    notes = _check_base(config, values.get("base_model_name_or_path"), weights)
    _check_options(config.lora, spec, weights)
    if (weights.parent / RUN_FILE).exists() and (note := _quant_note(config, weights)):
        notes.append(note)
    if config.lora.dropout != LoraSection().dropout:
        spec = dataclasses.replace(spec, dropout=config.lora.dropout)
    has_tokenizer = (weights.parent / "tokenizer_config.json").exists()
    return EarlierAdapter(
        weights=weights, spec=spec, tokenizer=weights.parent if has_tokenizer else None, notes=tuple(notes)
    )


def check_targets(model: PreTrainedModel, options: LoraSection, spec: LoraSpec) -> None:
    """Make sure that options which name layers mean those that an adapter has.

    Raises:
        ConfigError: They do not.
    """
    defaults = LoraSection()
    named = {name: getattr(options, name) for name in _TARGETS if getattr(options, name) != getattr(defaults, name)}
    if not named:
        return
    has = {target.path for target in find_targets(model, spec)}
    wants = {target.path for target in find_targets(model, LoraSpec(**named))}
    if has != wants:
        differing = sorted(has ^ wants)
        side = "has" if differing[0] in has else "lacks"
        raise ConfigError(
            f"lora.{next(iter(named))} means other layers than the adapter of lora.adapter, which {side} "
            f"{differing[0]}; leave it out, or start a new adapter"
        )


def _check_base(config: RunConfig, trained_on: str | None, weights: Path) -> list[str]:
    """Compare the base that an adapter names with the run's, and return what there is to say."""
    base = config.model.path
    if not trained_on or _is_same_place(trained_on, base):
        return []
    if Path(trained_on).name == Path(base).name:
        return [f"{weights.parent} was trained on {trained_on}; {base} is taken for the same"]
    raise ConfigError(
        f"lora.adapter {weights.parent} was trained on {trained_on}, not on {base}; set model.path to that. Where it "
        "has only moved, write its new path into adapter_config.json as base_model_name_or_path"
    )


def _is_same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _check_options(options: LoraSection, spec: LoraSpec, weights: Path) -> None:
    defaults = LoraSection()
    for field in dataclasses.fields(options):
        name, asked = field.name, getattr(options, field.name)
        if name in _FREE | _TARGETS or asked == getattr(defaults, name):
            continue
        if name == "trainable_token_indices":
            has: object = tuple(sorted({number for ids in spec.trainable_tokens.values() for number in ids}))
            asked = tuple(sorted(asked))
        else:
            has = getattr(spec, name)
        if asked != has:
            raise ConfigError(
                f"lora.{name} is {asked!r}, but the adapter to go on with ({weights.parent}) has {has!r}; leave it "
                "out, or start a new adapter"
            )


def _quant_note(config: RunConfig, weights: Path) -> str | None:
    before, options = load_run_quant(weights), config.quant
    now = (options.codebook, options.block_size, options.double_quant) if options.enabled else None
    then = None if before is None else (before.codebook, before.block_size, before.double_quant)
    if now == then:
        return None
    return f"{weights.parent} was trained on a base held otherwise ({_shown(then)}, now {_shown(now)})"


def _shown(quant: tuple[str, int, bool] | None) -> str:
    if quant is None:
        return "in 16 bits"
    return f"{quant[0]}, blocks of {quant[1]}{', double quantisation' if quant[2] else ''}"
