"""Rows of a few tokens trained beside a frozen embedding and output head (PEFT's trainable_token_indices).

    y = rows[slot(id)] where the token has a row here, else embedding(id)         logits[:, ids] = x rows'

Tokens that were added to the vocabulary lie beyond the base's matrices, which stay as they are: the rows of those
tokens exist here and nowhere else. So growing a vocabulary copies nothing, gradients, optimizer state and file are of
these rows alone, and taking the rows away gives the base back, bit for bit. Rows of tokens that the base has can be
trained too; they stand in place of the base's.

A new token starts as the mean of the rows that there are, under which its logit is the mean of the logits: unlikely,
and harmless, while random rows would be neither (transformers' mean resizing, without its noise of 1e-5). The rows that
training began with are kept, in the dtype of the base: they are what the model has with its adapters disabled.

Rows are fp32 master values and are cast for each use. Where the head is the embedding, both share one table.

Shapes: T tokens, N rows, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from halfbyte.errors import ConfigError


class TokenRows(nn.Module):
    """The rows themselves, and which tokens they are of."""

    ids_N: torch.Tensor
    slot_V: torch.Tensor
    initial_ND: torch.Tensor

    def __init__(self, ids: Sequence[int], initial_ND: torch.Tensor, *, vocabulary: int, is_trained: bool) -> None:
        """Start from `initial_ND`.

        Args:
            ids: Of the tokens, ascending.
            initial_ND: Their rows without training, in the dtype of the base.
            vocabulary: Tokens there are with those of `ids`.
            is_trained: Whether the rows are part of an adapter; otherwise they only make the vocabulary larger.
        """
        super().__init__()
        self.token_ids, self.vocabulary, self.is_trained = tuple(ids), vocabulary, is_trained
        self.adapter_enabled = True
        device = initial_ND.device
        ids_N = torch.tensor(self.token_ids, device=device)
        slot_V = torch.full((vocabulary,), -1, device=device).index_copy_(0, ids_N, torch.arange(len(ids_N)).to(device))
        self.register_buffer("ids_N", ids_N, persistent=False)
        self.register_buffer("slot_V", slot_V, persistent=False)
        self.register_buffer("initial_ND", initial_ND, persistent=False)
        self.rows = nn.Parameter(initial_ND.to(torch.float32, copy=True), requires_grad=is_trained)

    @property
    def rows_ND(self) -> torch.Tensor:
        """The rows in use: trained, or with adapters disabled those that training began with."""
        return self.rows if self.adapter_enabled else self.initial_ND

    def put_over(self, weight_VD: torch.Tensor) -> torch.Tensor:
        """Return a weight of the whole vocabulary, in the dtype of `weight_VD`."""
        grown_VD = weight_VD.new_empty(self.vocabulary, weight_VD.shape[1])
        grown_VD[: weight_VD.shape[0]] = weight_VD
        return grown_VD.index_copy_(0, self.ids_N.to(grown_VD.device), self.rows_ND.detach().to(grown_VD))

    def extra_repr(self) -> str:
        return f"tokens={len(self.token_ids)}, vocabulary={self.vocabulary}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TokenRows:
        before = self.rows.data
        super()._apply(fn, recurse)
        if self.rows.dtype != before.dtype:
            self.rows.data = before.to(self.rows.device)
        return self


class _WithRows(nn.Module):
    """A frozen module of the vocabulary some of whose rows are in a table."""

    def __init__(self, original: nn.Module, table: TokenRows) -> None:
        super().__init__()
        self.original: Any = original
        self.table = table

    def unwrap(self) -> nn.Module:
        """Return the frozen original alone."""
        return self.original

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the whole vocabulary, made anew at each call; `original.weight` costs nothing."""
        return self.table.put_over(self.original.weight.detach())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What else the model asks of the module that it knows (padding_idx, in_features) is answered by that.
            if name == "original":
                raise
            return getattr(self.original, name)


class RowsEmbedding(_WithRows):
    """An embedding some of whose rows are in a table."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of `input` (token ids, any shape) as the original does."""
        base = self.original(input.clamp(max=self.original.num_embeddings - 1))
        slot = self.table.slot_V[input]
        rows_ND = self.table.rows_ND.to(base.dtype)
        # Gemma's embedding does more than to look up.
        scale = getattr(self.original, "embed_scale", None)
        if scale is not None:
            rows_ND = rows_ND * torch.as_tensor(scale).to(rows_ND)
        return torch.where(slot[..., None] >= 0, functional.embedding(slot.clamp(min=0), rows_ND), base)

    def to_compute_device(self) -> nn.Module:
        """Return an embedding of the whole vocabulary on the device, in fp32: what can be trained whole."""
        plain = _fp32_copy(self.original, self.table)
        plain.num_embeddings = self.table.vocabulary
        return plain

    @property
    def num_embeddings(self) -> int:
        return self.table.vocabulary


class RowsHead(_WithRows):
    """An output head some of whose rows are in a table."""

    def __init__(self, original: nn.Module, table: TokenRows) -> None:
        if getattr(original, "bias", None) is not None:
            raise ConfigError("the output head has a bias, so rows of single tokens cannot be trained in it")
        super().__init__(original, table)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits of `input` (..., width) over the whole vocabulary."""
        base = self.original(input)
        own = functional.linear(input, self.table.rows_ND.to(input.dtype)).to(base.dtype)
        grown = functional.pad(base, (0, self.table.vocabulary - base.shape[-1]))
        return grown.index_copy(-1, self.table.ids_N, own)

    def to_compute_device(self) -> nn.Module:
        """Return a head of the whole vocabulary, in fp32: what can be trained whole."""
        plain = _fp32_copy(self.original, self.table)
        plain.out_features = self.table.vocabulary
        return plain

    @property
    def out_features(self) -> int:
        return self.table.vocabulary


def frozen_original(module: Any) -> Any:
    """Return an embedding or head without what is trained beside it."""
    while isinstance(module, (RowsEmbedding, RowsHead)):
        module = module.original
    return module


def _fp32_copy(original: Any, table: TokenRows) -> Any:
    if not isinstance(getattr(original, "weight", None), nn.Parameter):
        raise ConfigError(f"a {type(original).__name__} cannot be trained whole on a larger vocabulary")
    # A host embedding says itself how it becomes one that can be trained.
    make = getattr(original, "to_compute_device", None)
    plain: Any = copy.deepcopy(original).float() if make is None else make()
    plain.weight = nn.Parameter(table.put_over(plain.weight.detach()))
    return plain
