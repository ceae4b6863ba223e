"""Rows of embedding and output head that an adapter has, put into whole matrices."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from halfbyte.models import PreTrainedModel
from halfbyte.models.adapter_files import Adapter
from halfbyte.models.adapter_tokens import KnownRows
from halfbyte.models.vocabulary import grown_rows, padded_vocabulary, resize_vocabulary_
from halfbyte.nn.vocabulary import find_vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyRows:
    """What becomes of the vocabulary when an adapter is merged."""

    size: int | None
    """Words of the merged model, where they are more than the base's."""
    rows: dict[str, KnownRows]
    """By the name of the parameter."""
    targets: tuple[str, ...] = ()
    """Parameters of embedding and head."""

    @classmethod
    def of(cls, model: PreTrainedModel, adapter: Adapter, *, multiple: int) -> VocabularyRows:
        """Find them, and give `model`, which is on the meta device, the size that its matrices will have.

        Args:
            model: The base.
            adapter: Opened on it.
            multiple: What a vocabulary that grows becomes a multiple of.
        """
        words = find_vocabulary(model)
        if words is None or (adapter.spec.vocabulary is None and not adapter.rows):
            return cls(size=None, rows={})
        # A tied head is a parameter of its own name in some checkpoints.
        rows = {f"{p}.weight": adapter.rows[words.owner(p)] for p in words.paths if words.owner(p) in adapter.rows}
        size = None
        if adapter.spec.vocabulary is not None:
            size = padded_vocabulary(adapter.spec.vocabulary, words.size, multiple)
            resize_vocabulary_(model, size)
        return cls(size=size, rows=rows, targets=tuple(f"{path}.weight" for path in words.paths))

    def touches(self, target: str) -> bool:
        """Say whether a parameter has other rows than the base."""
        return target in self.rows or (self.size is not None and target in self.targets)

    def put(self, target: str, weight_VD: torch.Tensor) -> torch.Tensor:
        """Return a parameter of the base with its new rows, in its own dtype."""
        grown_VD, known = self.resize(target, weight_VD), self.rows.get(target)
        if known is None:
            return grown_VD
        return grown_VD.index_copy(0, torch.tensor(known.ids), known.rows_ND.to(grown_VD.dtype))

    def resize(self, target: str, weight: torch.Tensor) -> torch.Tensor:
        """Return embedding or head with as many rows as the merged model has words; other parameters as they are."""
        if self.size is None or target not in self.targets or weight.shape[0] == self.size:
            return weight
        return grown_rows(weight, self.size)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Entries of config.json."""
        return {} if self.size is None else {"vocab_size": self.size}

    @property
    def notes(self) -> list[str]:
        """What there is to say."""
        num_tokens = len({number for known in self.rows.values() for number in known.ids})
        notes = [f"trained rows of {num_tokens} tokens are in embedding and head"] if num_tokens else []
        return notes if self.size is None else [*notes, f"the vocabulary has {self.size:,} words now"]
