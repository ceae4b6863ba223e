"""Trained rows of single tokens in an adapter's file, and vocabularies that were made larger.

    base_model.model.<path>.token_adapter.trainable_tokens_delta     (tokens, width): the rows, not what they differ by

adapter_config.json has the tokens' ids as trainable_token_indices: a list for the embedding (and a head that is tied to
it), or a dictionary of names. Of a model whose vocabulary was made larger PEFT also writes embedding and head whole,
trained or not; of these we read the rows of new tokens, since the base has the others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.errors import ConfigError, FormatError
from halfbyte.nn import LoraSpec
from halfbyte.nn.targets import find_saved
from halfbyte.nn.vocabulary import Vocabulary, find_path, find_token_rows, find_vocabulary, iter_token_rows

ROWS, WHOLE = "trainable_tokens_delta", "base_layer.weight"
TOKENS_KEY = re.compile(
    rf"(?P<path>.+)\.token_adapter\.(?P<name>{re.escape(ROWS)}|{re.escape(WHOLE)})(\.[^.]+)?", re.ASCII
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenTensors:
    """What a file holds of single tokens, by the path of the module."""

    rows: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    whole: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Embedding or head as PEFT writes them for a larger vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KnownRows:
    """Rows of one module."""

    ids: tuple[int, ...]
    """Ascending."""
    rows_ND: torch.Tensor


def rows_key(path: str) -> str:
    """Return what a module's rows are called in the file, without the prefix."""
    return f"{path}.token_adapter.{ROWS}"


def settle_tokens(
    model: nn.Module,
    spec: LoraSpec,
    tokens: TokenTensors,
    saved: dict[str, dict[str, torch.Tensor]],
    weights_file: Path,
) -> tuple[LoraSpec, dict[str, KnownRows]]:
    """Return the specification with what the file says of the vocabulary, and the rows that it holds.

    Args:
        model: The base, without adapters; may be on the meta device.
        spec: As adapter_config.json has it.
        tokens: From the file.
        saved: Parameters of modules trained whole; those that PEFT only wrote along are taken out.
        weights_file: For messages.

    Raises:
        FormatError: File, configuration and model do not fit.
    """
    words = find_vocabulary(model)
    if words is None:
        if tokens.rows or spec.trainable_tokens:
            raise FormatError(f"{weights_file} holds rows of tokens, and {type(model).__name__} shows no embedding")
        return spec, {}
    whole = {**tokens.whole, **_written_along(model, spec, saved, words)}
    rows = _rows_by_id(model, spec, tokens, words, weights_file)
    sizes = {tensor.shape[0] for tensor in whole.values()}
    sizes |= {saved[path]["weight"].shape[0] for path in words.paths if "weight" in saved.get(path, {})}
    if len({size for size in sizes if size > words.size}) > 1:
        raise FormatError(f"{weights_file} holds vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens")
    size = max(words.size, *sizes, *(known.ids[-1] + 1 for known in rows.values()), 0)
    for path, weight_VD in whole.items():
        if words.owner(path) == path and weight_VD.shape[0] > words.size:
            rows[path] = _with_new_rows(rows.get(path), weight_VD, words.size)
    if size == words.size and not rows:
        return spec, {}
    known_spec = dataclasses.replace(
        spec,
        trainable_tokens={path: known.ids for path, known in rows.items()},
        vocabulary=size if size > words.size else None,
    )
    return known_spec, rows


@torch.no_grad()
def copy_rows_(model: nn.Module, rows: Mapping[str, KnownRows]) -> None:
    """Write rows into the tables of a model that has them attached."""
    for path, module in iter_token_rows(model):
        table = module.table
        slots = table.slot_V[torch.tensor(rows[path].ids, device=table.slot_V.device)]
        table.rows[slots] = rows[path].rows_ND.to(table.rows)


def listed_tokens(model: nn.Module, name_of: Iterable[tuple[str, tuple[int, ...]]]) -> list[int] | dict[str, list[int]]:
    """Return trainable_token_indices as PEFT writes them: a list where only the embedding has rows."""
    by_name = {path.rpartition(".")[2]: list(ids) for path, ids in name_of}
    embedding = getattr(model, "get_input_embeddings")()  # noqa: B009
    paths = [path for path, module in model.named_modules() if module is embedding]
    if len(by_name) == 1 and paths and paths[0].rpartition(".")[2] in by_name:
        return next(iter(by_name.values()))
    return by_name


def _written_along(
    model: nn.Module, spec: LoraSpec, saved: dict[str, dict[str, torch.Tensor]], words: Vocabulary
) -> dict[str, torch.Tensor]:
    """Take embedding and head out of `saved` where they are not meant to be there, but are larger than the base's."""
    meant = set(find_saved(model, spec)) if spec.modules_to_save else set()
    found = {}
    for path in words.paths:
        weight_VD = saved.get(path, {}).get("weight")
        if path not in meant and weight_VD is not None and weight_VD.shape[0] > words.size:
            found[path] = saved.pop(path)["weight"]
    return found


def _rows_by_id(
    model: nn.Module, spec: LoraSpec, tokens: TokenTensors, words: Vocabulary, weights_file: Path
) -> dict[str, KnownRows]:
    try:
        meant = find_token_rows(model, spec)
    except ConfigError as error:
        raise FormatError(f"{weights_file}: {error}") from error
    held = dict(tokens.rows)
    for path in [path for path in held if words.owner(path) != path]:
        # PEFT writes what is one table twice where the vocabulary was made larger.
        own, owner = held.pop(path), held.get(words.owner(path))
        if owner is None or not torch.equal(own, owner):
            raise FormatError(f"{weights_file}: {path} and {words.owner(path)} are one matrix, but their rows differ")
    if meant.keys() != held.keys():
        differing = sorted(meant.keys() ^ held.keys())
        raise FormatError(f"{weights_file} and adapter_config.json disagree about rows of {', '.join(differing)}")
    rows = {}
    for name, ids in spec.trainable_tokens.items():
        path = words.owner(find_path(words, name))
        module: Any = model.get_submodule(path)
        rows_ND, expected = held[path], (len(set(ids)), module.weight.shape[1])
        if rows_ND.shape != expected:
            raise FormatError(f"{weights_file}: rows of {path} are {list(rows_ND.shape)} for {list(expected)}")
        if not torch.isfinite(rows_ND).all():
            raise FormatError(f"{weights_file} is damaged: rows of {path} hold values that are not finite")
        order = sorted(range(len(ids)), key=lambda place: ids[place])
        rows[path] = KnownRows(ids=tuple(ids[place] for place in order), rows_ND=rows_ND[order].float())
    return rows


def _with_new_rows(known: KnownRows | None, weight_VD: torch.Tensor, size: int) -> KnownRows:
    """Return rows with those of every token from `size` on."""
    by_id = dict(zip(range(size, weight_VD.shape[0]), weight_VD[size:].float(), strict=True))
    if known is not None:
        by_id |= dict(zip(known.ids, known.rows_ND, strict=True))
    return KnownRows(ids=tuple(sorted(by_id)), rows_ND=torch.stack([by_id[number] for number in sorted(by_id)]))
