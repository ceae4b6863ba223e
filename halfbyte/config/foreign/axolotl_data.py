"""Axolotl's keys of data: where examples come from, how they are laid out, how they are cut and packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from halfbyte.config.foreign.rules import (
    differs,
    flag,
    held_out_share,
    names,
    option,
    switch,
    unneeded,
    unsupported,
    whole,
)
from halfbyte.config.foreign.translation import Document, Outcome, Rule, Taken, Unneeded, Unsupported
from halfbyte.errors import ConfigError

_ONE_SOURCE = "examples come from one file, folder or data set; put them into one folder, and name that"
# Templates that Axolotl has itself, mostly those of the models of that name.
_TEMPLATES = "alpaca aya cohere command_a deepseek_v2 deepseek_v3 exaone exaone4 falcon_h1 gemma gemma3 jamba llama3"
_TEMPLATES += " llama4 metharme mistral_v1 mistral_v2v3 mistral_v3_tekken mistral_v7_tekken phi_3 phi_35 phi_4 qwen_25"
_TEMPLATES += " qwen3 qwen3_5"
_OWN_TEMPLATE = "the model's own template is used, Axolotl's {} may differ: see halfbyte data"
# Axolotl's names of prompt styles, and our format of the same columns.
_STYLES = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "messages", "completion": "text"}
_INSTRUCTION_FIELDS = {"field_instruction": "prompt", "field_input": "input", "field_output": "completion"}
_INSTRUCTION_FIELDS |= {"field_system": "system"}
_SHARDED = "the whole data set is read"


def _datasets(value: Any, document: Document) -> Outcome:
    return _sources("datasets", value)


def _test_datasets(value: Any, document: Document) -> Outcome:
    found = _sources("test_datasets", value)
    if isinstance(found, Unsupported):
        return found
    assert isinstance(found, Taken)
    kept = _sources("datasets", document.get("datasets"))
    mine = {name: setting for name, setting in found.values.items() if name != "data.train"}
    theirs = {name: setting for name, setting in getattr(kept, "values", {}).items() if name != "data.train"}
    if mine != theirs:
        return Unsupported("held-out examples are laid out like those of training, in a split of the same name")
    return Taken({"data.held_out": found.values["data.train"]})


def _sources(key: str, value: Any) -> Outcome:
    """Return what becomes of a list of data sets: one is translated, entry by entry."""
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{key} is a list of data sets, each with path and type")
    if len(entries) > 1:
        return Unsupported(f"{len(entries)} data sets: {_ONE_SOURCE}")
    entry = {name: setting for name, setting in entries[0].items() if setting not in (None, "", [], {})}
    settings: dict[str, Any] = {}
    differences, refusals = [], []
    for outcome in _entry_outcomes(entry):
        if isinstance(outcome, Unsupported):
            refusals.append(outcome.reason)
        elif isinstance(outcome, Taken):
            columns = {**settings.get("data.columns", {}), **outcome.values.get("data.columns", {})}
            settings |= {**outcome.values, **({"data.columns": columns} if columns else {})}
            differences += [outcome.difference] if outcome.difference else []
    if refusals:
        return Unsupported("; ".join(refusals))
    return Taken(settings, "; ".join(differences))


def _entry_outcomes(entry: dict[str, Any]) -> Iterator[Outcome]:
    yield _source(entry)
    yield _layout(entry)
    for name, value in entry.items():
        if name in ("path", "data_files", "name", "type", "ds_type"):
            continue
        rule = _ENTRY_RULES.get(name)
        if rule is None:
            yield Unsupported(f"{name}: no key of a data set that is known here")
        else:
            outcome = rule(value, entry)
            yield Unsupported(f"{name}: {outcome.reason}") if isinstance(outcome, Unsupported) else outcome


def _source(entry: dict[str, Any]) -> Outcome:
    files = names(entry["data_files"]) if "data_files" in entry else ()
    if len(files) > 1:
        return Unsupported(f"data_files: {_ONE_SOURCE}")
    if files:
        return Taken({"data.train": files[0]})
    if "path" not in entry:
        raise ConfigError("a data set needs a path")
    path = str(entry["path"])
    if "://" in path:
        return Unsupported(f"path: {path} must be fetched first")
    return Taken({"data.train": f"{path}:{entry['name']}" if "name" in entry else path})


def _layout(entry: dict[str, Any]) -> Outcome:
    style = entry.get("type")
    if style is None:
        raise ConfigError("a data set needs a type")
    if isinstance(style, dict):
        return _instruction_fields(style)
    base, _, variant = str(style).partition(":")
    if base.split(".")[0] not in _STYLES or ("." in base and base.split(".")[0] != "sharegpt"):
        return Unsupported(f"type: {style!r} is a prompt style of Axolotl's; there are {', '.join(_STYLES)}")
    base = base.split(".")[0]
    values: dict[str, Any] = {"data.format": _STYLES[base]}
    if base == "alpaca":
        return Taken(values, "instruction and answer are written by the chat template, not as '### Instruction:'")
    if base == "completion":
        columns = {"data.columns": {"text": str(entry["field"])}} if "field" in entry else {}
        return Taken(values | columns, "a longer text is treated as data.overlong says, not cut into pieces")
    if variant:
        return Unsupported(f"type: {style!r}; name the template with chat_template")
    return Taken(values)


def _instruction_fields(style: dict[str, Any]) -> Outcome:
    """Return what becomes of a prompt that the user has laid out."""
    style = {name: value for name, value in style.items() if value not in (None, "")}
    if "field" in style:
        return Taken({"data.format": "text", "data.columns": {"text": style["field"]}})
    written = [name for name in style if name in ("format", "no_input_format", "system_format")]
    if written:
        return Unsupported(f"type: {', '.join(written)}: prompts are written by a template; see data.chat_template")
    unknown = sorted(style.keys() - _INSTRUCTION_FIELDS.keys() - {"system_prompt"})
    if unknown:
        return Unsupported(f"type: {', '.join(unknown)}: not known here")
    columns = {"prompt": "instruction", "completion": "output"}
    columns |= {_INSTRUCTION_FIELDS[name]: str(value) for name, value in style.items() if name in _INSTRUCTION_FIELDS}
    values: dict[str, Any] = {"data.format": "prompt_completion", "data.columns": columns}
    if "system_prompt" in style:
        values["data.system"] = style["system_prompt"]
    return Taken(values, "written by the chat template")


def _additional_tokens(value: Any, document: Document) -> Outcome:
    if document.get("tokens"):
        return Unsupported("write them into model.added_tokens, beside those of tokens")
    return Taken({"model.added_tokens": names(value)})


def _property_names(value: Any, entry: dict[str, Any]) -> Outcome:
    if not isinstance(value, dict):
        raise ConfigError("message_property_mappings has a line for each property")
    others = [name for name in value if name not in ("role", "content") and value[name] != name]
    if others:
        return Unsupported(f"{', '.join(others)} cannot have another name")
    plain = {name: str(value[name]) for name in ("role", "content") if value.get(name, name) != name}
    return Taken({"data.columns": plain} if plain else {})


def _roles(value: Any, entry: dict[str, Any]) -> Outcome:
    if not isinstance(value, dict):
        raise ConfigError("roles has a line for each role")
    return Taken({"data.columns": {role: "|".join(names(speakers)) for role, speakers in value.items()}})


def _column(part: str) -> Callable[[Any, dict[str, Any]], Outcome]:
    return lambda value, entry: Taken({"data.columns": {part: str(value)}} if value != part else {})


def _exactly(allowed: Any, reason: str) -> Callable[[Any, dict[str, Any]], Outcome]:
    return lambda value, entry: Taken({}) if value == allowed else Unsupported(reason)


def _off(reason: str) -> Callable[[Any, dict[str, Any]], Outcome]:
    return lambda value, entry: Unsupported(reason) if value else Taken({})


def _chat_template(value: Any, document: Document) -> Outcome:
    return _named_template(value, document.get("chat_template_jinja"))


def _named_template(value: Any, jinja: Any) -> Outcome:
    word = str(value)
    if word == "tokenizer_default":
        return Taken({})
    if word == "jinja":
        return Taken({"data.chat_template": jinja}) if jinja else Unsupported("chat_template_jinja is missing")
    if word == "chatml":
        return Taken({"data.chat_template": "chatml"})
    if word == "tokenizer_default_fallback_chatml":
        return Taken({}, "chatml stands in only where the tokenizer has its markers")
    if word in _TEMPLATES.split():
        return Taken({}, _OWN_TEMPLATE.format(word))
    return Unsupported(f"{word!r} is no template that is known here; see data.chat_template")


def _jinja(value: Any, document: Document) -> Outcome:
    if document.get("chat_template") in (None, "jinja"):
        return Taken({"data.chat_template": value})
    return Unneeded("chat_template is not jinja")


def _held_out(value: Any, document: Document) -> Outcome:
    if document.get("test_datasets"):
        return Unneeded("test_datasets are held out")
    return held_out_share(value, document)


def _overlong(value: Any, document: Document) -> Outcome:
    words = {"drop": "drop", "truncate": "cut", "raise": "error"}
    return (
        Taken({"data.overlong": words[value]}) if value in words else Unsupported(f"{value!r}; drop, truncate, raise")
    )


def _train_on_inputs(value: Any, document: Document) -> Outcome:
    return Taken({"data.train_on": "all" if flag(value) else "assistant"})


_ENTRY_RULES: dict[str, Callable[[Any, dict[str, Any]], Outcome]] = {
    "split": lambda value, entry: Taken({"data.split": str(value)}),
    "field": lambda value, entry: (
        Taken({}) if entry.get("type") == "completion" else Unsupported("for completion only")
    ),
    "field_messages": _column("messages"),
    "message_field_role": _column("role"),
    "message_field_content": _column("content"),
    "message_property_mappings": _property_names,
    "field_system": _exactly("system", "a system prompt stands in the column system or system_prompt"),
    "field_tools": _exactly("tools", "tools stand in the column tools"),
    "roles": _roles,
    "roles_to_train": _exactly(["assistant"], "the assistant's turns are learned, or data.train_on=all"),
    "train_on_eos": _exactly("turn", "the end of each learned turn is learned"),
    "train_on_eot": _exactly("turn", "the end of each learned turn is learned"),
    "message_field_training": _exactly("weight", "a turn is left out of the loss by weight: 0"),
    "message_field_training_detail": _off("a turn is learned or not, as a whole"),
    "chat_template": lambda value, entry: _named_template(value, entry.get("chat_template_jinja")),
    "chat_template_jinja": lambda value, entry: Taken({"data.chat_template": value}),
    "conversation": lambda value, entry: _named_template(value, None),
    "drop_system_message": _off("system prompts are kept"),
    "split_thinking": _off("thoughts stay where they are"),
    "shards": _off(_SHARDED),
    "shards_idx": _off(_SHARDED),
    "preprocess_shards": lambda value, entry: Taken({}),
    "revision": _off("the newest revision of a data set is read"),
    "trust_remote_code": _off("no code of a data set runs here"),
}
DATA_RULES: dict[str, Rule] = {
    "datasets": _datasets,
    "test_datasets": _test_datasets,
    "pretraining_dataset": unsupported("data sets are read whole, not streamed"),
    "val_set_size": _held_out,
    "sequence_len": whole("data.max_length"),
    "excess_length_strategy": _overlong,
    "sample_packing": switch("data.packing"),
    "min_sample_len": unsupported("short examples are kept"),
    "train_on_inputs": _train_on_inputs,
    "chat_template": _chat_template,
    "chat_template_jinja": _jinja,
    "default_system_message": option("data.system"),
    "eot_tokens": unneeded("what ends a turn is found in the template, and always learned"),
    "special_tokens.pad_token": unneeded("padding is never read nor learned, whatever stands there"),
    **{
        f"special_tokens.{name}": differs(f"the tokenizer's own {name} is used: make sure that it is {{!r}}")
        for name in ("bos_token", "eos_token", "unk_token")
    },
    "special_tokens.additional_special_tokens": _additional_tokens,
    "tokens": lambda value, document: Taken({"model.added_tokens": names(value)}),
    "added_tokens_overrides": unsupported("no tokens are renamed"),
    "fix_untrained_tokens": unsupported("embeddings are left as they are"),
    "dataset_exact_deduplication": unsupported("remove repeated rows first"),
    "dataset_shard_num": unsupported(_SHARDED),
    "dataset_shard_idx": unsupported(_SHARDED),
    "shuffle_merged_datasets": lambda value, document: Taken({}) if value else Unsupported("examples are shuffled"),
    **dict.fromkeys(
        ("pad_to_sequence_len", "total_num_tokens", "total_supervised_tokens", "multipack_real_batches"),
        unneeded("rows are filled, or padded to the longest; the loss counts trained tokens only"),
    ),
    **dict.fromkeys(
        ("sample_packing_eff_est", "sample_packing_group_size", "sample_packing_bin_size", "batch_flattening"),
        unneeded("how rows are filled changes nothing: examples are kept apart"),
    ),
    "sample_packing_sequentially": unsupported("examples are shuffled"),
    "remove_unused_columns": unneeded("only columns of the format are read"),
    "skip_prepare_dataset": unsupported("examples are always tokenised here"),
}
