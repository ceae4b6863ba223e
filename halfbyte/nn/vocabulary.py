"""The vocabulary of a model: its embedding and its output head, and tokens whose rows are trained or that are new.

See `token_rows` for how. A token beyond the base's vocabulary has a row in the embedding and one in the head; where one
of a module's rows is trained, so are all of its new ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.errors import ConfigError
from halfbyte.nn.convert import output_head, replace_module
from halfbyte.nn.saved_module import SavedModule
from halfbyte.nn.spec import INPUT_EMBEDDING, LoraSpec
from halfbyte.nn.token_rows import RowsEmbedding, RowsHead, TokenRows


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Where a model keeps the rows of its words."""

    embedding: str
    """Path of the embedding."""
    head: str | None
    """Path of the output head, if there is one."""
    is_tied: bool
    """Whether the head is the embedding."""
    size: int
    """Words of the base."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of both modules."""
        return (self.embedding,) if self.head is None else (self.embedding, self.head)

    def owner(self, path: str) -> str:
        """Return the path of the module whose table a module uses."""
        return self.embedding if self.is_tied else path


def find_vocabulary(model: nn.Module) -> Vocabulary | None:
    """Return where a model without rows of its own keeps its words; None where it does not say."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding, head = None if get_embedding is None else get_embedding(), output_head(model)
    if embedding is None or not hasattr(embedding, "num_embeddings"):
        return None
    path_of = {module: path for path, module in model.named_modules()}
    return Vocabulary(
        embedding=path_of[embedding],
        head=path_of.get(head) if head is not None else None,
        is_tied=head is not None and getattr(head, "weight", None) is embedding.weight,
        size=embedding.num_embeddings,
    )


def find_token_rows(model: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Return the ids of the tokens whose rows `spec` means to be trained, by the path of the module.

    Where the head is the embedding, there is one entry, the embedding's.

    Raises:
        ConfigError: A name is neither the embedding's nor the head's, or an id cannot be.
    """
    if not spec.trainable_tokens and spec.vocabulary is None:
        return {}
    words = _vocabulary_of(model)
    rows: dict[str, set[int]] = {}
    for name, ids in spec.trainable_tokens.items():
        path = find_path(words, name)
        if any(not isinstance(number, int) or number < 0 for number in ids):
            raise ConfigError(f"trainable_token_indices holds {min(ids)}; ids of tokens are 0 or above")
        if any(path == saved or path.endswith(f".{saved}") for saved in spec.modules_to_save):
            raise ConfigError(f"{path} is trained whole (modules_to_save), so single rows of it cannot be as well")
        rows.setdefault(words.owner(path), set()).update(ids)
    size = wanted_vocabulary(model, spec)
    return {path: tuple(sorted(ids | set(range(words.size, size)))) for path, ids in rows.items() if ids}


def wanted_vocabulary(model: nn.Module, spec: LoraSpec) -> int:
    """Return the words that a model has with the adapters that `spec` means."""
    largest = max((max(ids, default=-1) for ids in spec.trainable_tokens.values()), default=-1)
    return max(_vocabulary_of(model).size, largest + 1, spec.vocabulary or 0)


def attach_token_rows(model: nn.Module, spec: LoraSpec) -> None:
    """Give embedding and head the rows that `spec` means, untrained, and the model the size of the vocabulary."""
    trained = find_token_rows(model, spec)
    if not trained and spec.vocabulary is None:
        return
    words, size = _vocabulary_of(model), wanted_vocabulary(model, spec)
    new = tuple(range(words.size, size))
    tables: dict[str, TokenRows] = {}
    for path in words.paths:
        owner = words.owner(path)
        ids = trained.get(owner, new)
        if not ids:
            continue
        module = model.get_submodule(path)
        if owner not in tables:
            initial_ND = _initial_rows(module, ids, words.size)
            tables[owner] = TokenRows(ids, initial_ND, vocabulary=size, is_trained=owner in trained)
        wrap = RowsEmbedding if path == words.embedding else RowsHead
        replace_module(model, path, wrap(module.requires_grad_(False), tables[owner]))
    set_vocabulary_size(model, size)


def iter_token_rows(model: nn.Module) -> Iterator[tuple[str, RowsEmbedding | RowsHead]]:
    """Yield path and module of each embedding and head with trained rows; of a tied pair the embedding."""
    return select_token_rows(model.named_modules())


def select_token_rows(
    modules: Iterable[tuple[str, nn.Module]],
) -> Iterator[tuple[str, RowsEmbedding | RowsHead]]:
    """Yield what `iter_token_rows` does, of modules with their paths."""
    seen: set[TokenRows] = set()
    for path, module in modules:
        if isinstance(module, (RowsEmbedding, RowsHead)) and module.table.is_trained and module.table not in seen:
            seen.add(module.table)
            yield path, module


@torch.no_grad()
def start_from_mean_(model: nn.Module, ids: Sequence[int], *, num_words: int) -> None:
    """Let tokens start as the mean of the first `num_words` rows, whatever rows the base has for them.

    Larger matrices than there are words hold rows that nobody has trained.
    """
    for _, module in iter_token_rows(model):
        table = module.table
        slots = table.slot_V[torch.tensor(ids, dtype=torch.long, device=table.slot_V.device)]
        table.rows[slots[slots >= 0]] = _mean_row(module.original.weight, num_words).to(table.rows.device)


def set_vocabulary_size(model: Any, size: int) -> None:
    """Write the size of a vocabulary where transformers looks for it."""
    model.config.get_text_config(decoder=True).vocab_size = size
    for owner in (model, getattr(model, "base_model", model)):
        if hasattr(owner, "vocab_size"):
            owner.vocab_size = size


def vocabulary_size(model: Any) -> int:
    """Return the size of a vocabulary as transformers knows it."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _vocabulary_of(model: nn.Module) -> Vocabulary:
    words = find_vocabulary(model)
    if words is None:
        raise ConfigError(f"{type(model).__name__} does not show its embedding, so no rows of it can be trained")
    return words


def find_path(words: Vocabulary, name: str) -> str:
    """Return the path of the embedding or head that a name means.

    Raises:
        ConfigError: It means neither.
    """
    if name == INPUT_EMBEDDING:
        return words.embedding
    for path in words.paths:
        if path == name or path.endswith(f".{name}"):
            return path
    raise ConfigError(
        f"trainable_token_indices names {name!r}; only rows of the embedding and the output head can be trained alone: "
        f"{', '.join(words.paths)}"
    )


def _initial_rows(module: Any, ids: tuple[int, ...], size: int) -> torch.Tensor:
    """Return the rows that the base has, and the mean for those that it lacks."""
    weight_VD = module.weight.detach()
    known = torch.tensor([number for number in ids if number < size], dtype=torch.long, device=weight_VD.device)
    mean_1D = _mean_row(weight_VD, None).to(weight_VD.dtype)[None]
    rows_ND = torch.cat([weight_VD[known], mean_1D.expand(len(ids) - len(known), -1)])
    return rows_ND.to(getattr(module, "compute_device", weight_VD.device))


def _mean_row(weight_VD: torch.Tensor, num_words: int | None) -> torch.Tensor:
    return weight_VD[:num_words].mean(0, dtype=torch.float32)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return a module without what this package has put around it to train it."""
    while isinstance(module, (RowsEmbedding, RowsHead, SavedModule)):
        module = module.unwrap()
    return module
