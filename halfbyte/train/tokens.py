"""Tokens that a run adds: into the tokenizer, and into what is trained.

tokenizer + names -> ids -> rows of embedding and head to train, or larger modules that are trained whole
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.config import RunConfig
from halfbyte.data.template_tokens import find_split_markers
from halfbyte.errors import ConfigError
from halfbyte.models.vocabulary import padded_vocabulary
from halfbyte.nn import LoraSpec
from halfbyte.nn.attach import iter_saved
from halfbyte.nn.spec import INPUT_EMBEDDING
from halfbyte.nn.vocabulary import find_vocabulary, start_from_mean_

FROM_TEMPLATE = "template"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunTokens:
    """What became of the tokens that a run names."""

    ids: tuple[int, ...]
    """Of all of them."""
    new_ids: tuple[int, ...]
    """Of those that the tokenizer did not have."""
    num_words: int
    """Tokens that it had."""
    num_words_now: int
    note: str
    """For people."""


def add_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunTokens | None:
    """Give a tokenizer the tokens that a run adds; None where it adds none.

    Raises:
        ConfigError: A name is empty, or no template has a marker to add.
    """
    named = config.model.added_tokens
    if not named:
        return None
    names = find_split_markers(tokenizer, config.data.chat_template) if named == FROM_TEMPLATE else list(named)
    if any(not name.strip() for name in names):
        raise ConfigError("model.added_tokens holds an empty name")
    num_words, known = len(tokenizer), tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    now = tokenizer.get_vocab()
    ids = {name: now[name] for name in names}
    new = [name for name in names if name not in known]
    there = [name for name in names if name in known]
    if named == FROM_TEMPLATE and not names:
        note = "tokens: each marker of the chat template is one already, so none is added"
    else:
        parts = [f"{', '.join(new)} added" if new else "", f"{', '.join(there)} there already" if there else ""]
        note = f"tokens: {'; '.join(filter(None, parts))}; the tokenizer has {len(tokenizer):,} now"
    return RunTokens(
        ids=tuple(sorted(set(ids.values()))),
        new_ids=tuple(sorted(ids[name] for name in new)),
        num_words=num_words,
        num_words_now=len(tokenizer),
        note=note,
    )


def spec_with_tokens(spec: LoraSpec, model: PreTrainedModel, config: RunConfig, tokens: RunTokens | None) -> LoraSpec:
    """Return a specification of adapters with the rows that a run trains.

    Raises:
        ConfigError: The model does not allow for it.
    """
    ids = set(config.lora.trainable_token_indices) | set(() if tokens is None else tokens.ids)
    if not ids:
        return spec
    words = find_vocabulary(model)
    if words is None:
        raise ConfigError(f"{type(model).__name__} does not show its embedding, so no tokens can be added to it")
    whole = [p for p in words.paths if any(p == name or p.endswith(f".{name}") for name in spec.modules_to_save)]
    if words.is_tied and len(whole) == 1:
        raise ConfigError(
            f"the output head of this model is its embedding: name both in lora.modules_to_save "
            f"({', '.join(path.rpartition('.')[2] for path in words.paths)}), or neither, so that new rows alone are "
            "trained"
        )
    size = max(words.size, max(ids) + 1)
    if whole:
        size = padded_vocabulary(size, words.size, config.model.pad_vocabulary_to)
    owners = dict.fromkeys(words.owner(path) for path in words.paths if path not in whole)
    rows = {INPUT_EMBEDDING if path == words.embedding else path: tuple(sorted(ids)) for path in owners}
    return dataclasses.replace(spec, trainable_tokens=rows, vocabulary=size if size > words.size else None)


@torch.no_grad()
def start_new_tokens_(model: PreTrainedModel, tokens: RunTokens | None) -> None:
    """Let tokens that are new to the tokenizer start as the mean row, also where the base has rows to spare."""
    if tokens is None or not tokens.new_ids:
        return
    start_from_mean_(model, tokens.new_ids, num_words=tokens.num_words)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for _, module in iter_saved(model):
        if module in ends:
            weight_VD: Any = module.trained.weight
            weight_VD[list(tokens.new_ids)] = weight_VD[: tokens.num_words].mean(0)
