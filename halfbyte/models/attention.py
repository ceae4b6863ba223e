"""Attention that keeps the documents of a packed batch apart, as an implementation transformers can be told to use.

A packed batch holds several documents a row. Attention must treat each as if it were alone:

    y[t] = sum over s of softmax(scaling * q[t] k[s])[s] v[s],   s <= t, s in t's document, s > t - window

transformers' own implementations learn of documents from restarting positions, build a (tokens x tokens) mask for
them, and only where no cache is used; boundaries that are passed to them are ignored. Ours is told the boundaries and
never builds such a mask: equal-length neighbours are one plain causal batch, anything else goes document by document
(CPU, or fp32) or through torch's variable-length kernel (CUDA, 16 bits). Documents longer than a sliding window are
cut into window-sized blocks of queries, so that memory stays linear in length.

Layout: the boundaries count tokens of the batch flattened row by row, and each row ends with a boundary. They reach
the attention function as keywords of the model's forward: `cu_seq_lens_q` (and `_k`, `max_length_q`, `max_length_k`,
the names that flash attention has in transformers) and `document_layout`, the same boundaries known to the host, so
that no layer has to wait for the device to plan its work.

Softcapped scores (Gemma 2) and attention sinks (gpt-oss) exist in no kernel of torch: they take plain matrix products,
document by document, quadratic in the length of a document but not of the batch.

Without boundaries (generation, caches, padded batches) transformers' sdpa does the work with its own masks.

`register_packed_attention()` puts the function under the name "halfbyte" into transformers' public registries; nothing
happens at import.

Shapes: B rows, T tokens a row, N query heads, H head width, L tokens of a document, C documents of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch.nn import functional

from halfbyte.errors import ConfigError

PACKED_ATTENTION = "halfbyte"
MAX_VARLEN_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class DocumentLayout:
    """Where the documents of a packed batch begin and end, known to the host."""

    runs: tuple[tuple[int, int], ...]
    """(number of documents, tokens of each) of neighbours of equal length, in order."""
    max_length: int
    """Tokens of the longest document, or more."""
    is_fixed: bool = True
    """Whether work may be planned by `runs`; otherwise only the boundaries on the device count."""

    @classmethod
    def from_boundaries(cls, boundaries: list[int]) -> DocumentLayout:
        """Read cumulative boundaries 0, end of the first document, ..., end of the batch."""
        lengths = [end - start for start, end in itertools.pairwise(boundaries)]
        if not lengths or boundaries[0] != 0 or min(lengths) < 1:
            raise ValueError(f"boundaries {boundaries[:8]}... do not rise from 0")
        runs = tuple((len(list(group)), length) for length, group in itertools.groupby(lengths))
        return cls(runs=runs, max_length=max(lengths))


def register_packed_attention() -> str:
    """Make "halfbyte" known to transformers as an attention implementation, and return that name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    return PACKED_ATTENTION


def packed_attention_forward(
    module: torch.nn.Module,
    query_BNTH: torch.Tensor,
    key_BNTH: torch.Tensor,
    value_BNTH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within documents where boundaries are given, as transformers' sdpa otherwise.

    Args:
        module: The attention module that calls.
        query_BNTH: (rows, query heads, tokens, head width).
        key_BNTH: (rows, key heads, tokens, head width); query heads are a multiple of key heads.
        value_BNTH: As the keys.
        attention_mask: Used only without boundaries.
        dropout: Share of attention weights dropped.
        scaling: Factor on the scores; 1 / sqrt(head width) by default.
        **kwargs: cu_seq_lens_q, document_layout, sliding_window, softcap, s_aux, and what does not concern attention.

    Returns:
        (rows, tokens, query heads, head width), and None in place of attention weights.

    Raises:
        ConfigError: The model asks for something that this attention cannot do on a packed batch.
    """
    if kwargs.get("cu_seq_lens_q") is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query_BNTH.shape[2] > 1:
            raise ConfigError(
                f"{type(module).__name__} is not told where documents end; choose another model.attention"
            )
        return _attend_unpacked(module, query_BNTH, key_BNTH, value_BNTH, attention_mask, dropout, scaling, kwargs)
    _refuse_what_packing_excludes(module, query_BNTH, key_BNTH, kwargs)
    rows, _, tokens, _ = query_BNTH.shape
    attend = _Attend(
        scaling=query_BNTH.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks_N=kwargs.get("s_aux"),
    )
    boundaries = kwargs["cu_seq_lens_q"]
    layout = kwargs.get("document_layout") or DocumentLayout.from_boundaries(boundaries.tolist())
    if layout.is_fixed and layout.runs == ((rows, tokens),):
        return attend.causal(query_BNTH, key_BNTH, value_BNTH).transpose(1, 2).contiguous(), None
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query_BNTH, key_BNTH, value_BNTH)]
    if (len(layout.runs) > 1 or not layout.is_fixed) and attend.varlen_fits(query_BNTH):
        out_TNH = attend.varlen(*flat, boundaries=boundaries, max_length=layout.max_length)
    else:
        out_TNH = attend.by_runs(*flat, runs=layout.runs)
    return out_TNH.view(rows, tokens, *out_TNH.shape[1:]), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attend:
    """Causal attention with the settings of one layer."""

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks_N: torch.Tensor | None = None

    @property
    def by_products(self) -> bool:
        """Whether no kernel computes this."""
        return self.softcap is not None or self.sinks_N is not None

    def varlen_fits(self, query: torch.Tensor) -> bool:
        """Say whether torch's variable-length kernel computes this."""
        return (
            query.is_cuda
            and query.dtype in (torch.float16, torch.bfloat16)
            and query.shape[-1] <= MAX_VARLEN_WIDTH
            and not self.by_products
            and self.dropout == 0
            and varlen_attention() is not None
        )

    def varlen(
        self,
        query_TNH: torch.Tensor,
        key_TNH: torch.Tensor,
        value_TNH: torch.Tensor,
        *,
        boundaries: torch.Tensor,
        max_length: int,
    ) -> torch.Tensor:
        kernel = varlen_attention()
        assert kernel is not None
        left = -1 if self.window is None else self.window - 1
        return kernel(
            query_TNH,
            key_TNH,
            value_TNH,
            boundaries,
            boundaries,
            max_length,
            max_length,
            scale=self.scaling,
            window_size=(left, 0),
        )

    def by_runs(
        self,
        query_TNH: torch.Tensor,
        key_TNH: torch.Tensor,
        value_TNH: torch.Tensor,
        *,
        runs: tuple[tuple[int, int], ...],
    ) -> torch.Tensor:
        # split, not slicing: the backward of a slice fills a gradient of the whole length with zeros.
        sizes = [count * length for count, length in runs]
        parts = zip(*(t.split(sizes) for t in (query_TNH, key_TNH, value_TNH)), strict=True)
        outs = []
        for (count, length), part in zip(runs, parts, strict=True):
            batch = [t.unflatten(0, (count, length)).transpose(1, 2) for t in part]
            outs.append(self.causal(*batch).transpose(1, 2).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def causal(self, query_CNLH: torch.Tensor, key_CNLH: torch.Tensor, value_CNLH: torch.Tensor) -> torch.Tensor:
        """Attend in a batch of documents of equal length."""
        length = query_CNLH.shape[2]
        if self.by_products:
            mask_LL = causal_mask(length, window=self.window, device=query_CNLH.device)
            return self.products(query_CNLH, key_CNLH, value_CNLH, mask=mask_LL)
        if self.window is not None and length > self.window:
            blocks = list(self._window_blocks(query_CNLH, key_CNLH, value_CNLH, window=self.window))
            return torch.cat(blocks, dim=2)
        return self._kernel(query_CNLH, key_CNLH, value_CNLH, is_causal=length > 1)

    def _window_blocks(
        self, query_CNLH: torch.Tensor, key_CNLH: torch.Tensor, value_CNLH: torch.Tensor, *, window: int
    ) -> Iterator[torch.Tensor]:
        """Attend from one window-sized block of queries after another, each to the two windows that it can see."""
        length = query_CNLH.shape[2]
        for start in range(0, length, window):
            end, first = min(start + window, length), max(start - window + 1, 0)
            seen = torch.arange(first, end, device=query_CNLH.device)
            position = torch.arange(start, end, device=query_CNLH.device)[:, None]
            mask = (seen <= position) & (seen > position - window)
            yield self._kernel(
                query_CNLH[:, :, start:end], key_CNLH[:, :, first:end], value_CNLH[:, :, first:end], mask=mask
            )

    def _kernel(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        grouped = query.shape[1] != key.shape[1]
        # cuDNN's kernel is faster than torch's own by half on a Hopper, and not what torch takes first.
        with fastest_kernel_first() if query.is_cuda else contextlib.nullcontext():
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.dropout,
                is_causal=is_causal,
                scale=self.scaling,
                enable_gqa=grouped,
            )

    def products(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend by plain products: softcap on the scores, sinks as one more score that no value answers to.

        The mask is boolean, true where a query sees a key, and broadcasts to (documents, heads, queries, keys).
        """
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
        scores = (query @ key.transpose(2, 3)) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.sinks_N is not None:
            sinks = self.sinks_N.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        weights = functional.dropout(weights[..., : key.shape[2]], p=self.dropout)
        return weights @ value


def causal_mask(length: int, *, window: int | None, device: torch.device) -> torch.Tensor:
    """Return the (length, length) mask, true where a query sees a key."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def fastest_kernel_first() -> AbstractContextManager[None]:
    """Have torch try cuDNN's attention first, then its own kernels, for what runs inside."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def has_varlen_attention(config: Any, dtype: torch.dtype) -> bool:
    """Say whether documents of a model on a GPU are told apart by boundaries on the device, whatever their lengths."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dtype in (torch.float16, torch.bfloat16) and width <= MAX_VARLEN_WIDTH and varlen_attention() is not None


@functools.cache
def varlen_attention() -> Callable[..., torch.Tensor] | None:
    """Return torch's variable-length attention with grouped heads allowed, or None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters or "scale" not in parameters:
        return None
    # Older releases take grouped heads as they come, newer ones want to be asked.
    kernel = functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn
    return cast("Callable[..., torch.Tensor]", kernel)


def _attend_unpacked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is None and sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    attend = _Attend(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, dropout=dropout, softcap=softcap, sinks_N=sinks
    )
    if mask is None and query.shape[2] > 1:
        # transformers leaves the mask out where it is the causal one, aligned to the first key.
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = ones.tril()
    return attend.products(query, key, value, mask=mask).transpose(1, 2).contiguous(), None


def _refuse_what_packing_excludes(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    if query.shape[2] != key.shape[2]:
        raise ConfigError(f"{name}: a packed batch cannot be used together with a cache; pass use_cache=False")
    if kwargs.get("position_bias") is not None:
        raise ConfigError(f"{name} adds a position bias to its scores, which packing does not cover; set packing=false")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ConfigError(f"{name} is not causal, so its examples cannot be packed; set packing=false")
