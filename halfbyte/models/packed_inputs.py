"""What a model's forward must be given so that packed documents stay apart, whichever attention it uses.

Ours and flash attention take the boundaries. sdpa and eager ignore them and need a (rows, 1, tokens, tokens) mask,
flex attention a block mask; a model that mixes full and sliding layers takes one of each, by layer type. Position ids
alone are not relied on: they isolate only under some implementations and only without a cache.

Since an implementation can ignore what it is given, `prove_isolation` tries it on the model at hand: it changes the
first of two packed documents and looks whether the second one notices.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.models.attention import PACKED_ATTENTION, DocumentLayout
from halfbyte.models.modes import eval_mode

FULL, SLIDING = "full_attention", "sliding_attention"
PROBE_LENGTHS = (6, 7)


def build_forward_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords with which `model` or its decoder reads a batch.

    A padded batch is filled up on the right, where a causal model does not look: it needs no mask.

    Args:
        model: Decides by its attention implementation what is needed.
        batch: input_ids (rows, tokens); packed batches also position_ids (rows, tokens) and cu_seq_lens
            (documents + 1), and may carry their DocumentLayout as document_layout.

    Raises:
        ConfigError: The model has layers that cannot keep packed documents apart.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    boundaries = batch.get("cu_seq_lens")
    if boundaries is None:
        return inputs
    inputs["position_ids"] = batch["position_ids"]
    implementation = model.config._attn_implementation
    if implementation == PACKED_ATTENTION or "flash" in implementation:
        layout = batch.get("document_layout") or DocumentLayout.from_boundaries(boundaries.tolist())
        inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        inputs |= {"max_length_q": layout.max_length, "max_length_k": layout.max_length}
    if implementation == PACKED_ATTENTION:
        inputs["document_layout"] = layout
        # transformers takes a mask of four dimensions as it is; ours ignores it. Without one it would build its own.
        inputs["attention_mask"] = boundaries.new_ones(1, 1, 1, 1, dtype=torch.bool)
    elif "flash" not in implementation:
        inputs["attention_mask"] = _build_masks(model, batch, implementation)
    return inputs


def prove_isolation(model: PreTrainedModel) -> None:
    """Make sure, by trying, that a packed document has no influence on its neighbour.

    Raises:
        ConfigError: It has.
    """
    embedding = _embedding_weight(model)
    vocabulary, device = embedding.shape[0], embedding.device
    first, second = PROBE_LENGTHS
    ids = torch.arange(1, first + second + 1, device=device).remainder(vocabulary)[None]
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None].to(device)
    boundaries = torch.tensor([0, first, first + second], dtype=torch.int32, device=device)
    other = ids.clone()
    other[:, :first] = (ids[:, :first] * 7 + 5).remainder(vocabulary)
    outs = []
    with eval_mode(model), torch.no_grad():
        for probe in (ids, other):
            batch = {"input_ids": probe, "position_ids": positions, "cu_seq_lens": boundaries}
            outs.append(read_hidden_states(model, batch).float()[:, first:])
    change = (outs[0] - outs[1]).abs().max().item()
    # Kernels that order their sums by the whole batch may differ in the last bits; a leak is far larger.
    limit = 8 * torch.finfo(compute_dtype_of(model)).eps * outs[0].abs().max().item()
    if not change <= limit:
        raise ConfigError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets packed examples see "
            "each other (its layers carry state between tokens, or ignore document boundaries); set data.packing=false"
        )


def read_hidden_states(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the decoder's last hidden states (rows, tokens, width), without the output head."""
    return model.base_model(**build_forward_inputs(model, batch)).last_hidden_state


def compute_dtype_of(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the model's activations: what its embedding gives, which may be wider than what it holds."""
    embedding = model.get_input_embeddings()
    dtype = getattr(embedding, "compute_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else _embedding_weight(model).dtype


def _embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _build_masks(
    model: PreTrainedModel, batch: Mapping[str, Any], implementation: str
) -> torch.Tensor | dict[str, torch.Tensor]:
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [FULL if window is None else SLIDING])
    if not kinds <= {FULL, SLIDING}:
        raise ConfigError(
            f"{type(model).__name__} has layers of type {', '.join(sorted(kinds - {FULL, SLIDING}))}, for which no "
            f"mask of attention {implementation!r} keeps packed examples apart; set data.packing=false"
        )
    dtype = compute_dtype_of(model)
    masks = {}
    for kind in kinds:
        seen = _SeenKeys(batch, window=window if kind == SLIDING else None)
        masks[kind] = seen.flex() if implementation == "flex_attention" else seen.dense(implementation, dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


class _SeenKeys:
    """Which keys a query of a packed batch sees, as the mask of one implementation or another."""

    def __init__(self, batch: Mapping[str, Any], *, window: int | None) -> None:
        self.shape_BT = batch["input_ids"].shape
        boundaries = batch["cu_seq_lens"]
        numbers = torch.arange(len(boundaries) - 1, device=boundaries.device)
        self.document_BT = numbers.repeat_interleave(boundaries.diff()).view(self.shape_BT)
        self.window = window

    def sees(self, row: Any, head: Any, query: Any, key: Any) -> Any:
        """Say it for indices, elementwise; the form that flex attention asks for."""
        seen = (self.document_BT[row, query] == self.document_BT[row, key]) & (query >= key)
        return seen if self.window is None else seen & (query - key < self.window)

    def dense(self, implementation: str, dtype: torch.dtype) -> torch.Tensor:
        rows, tokens = self.shape_BT
        row = torch.arange(rows, device=self.document_BT.device)[:, None, None, None]
        token = torch.arange(tokens, device=self.document_BT.device)
        seen = self.sees(row, None, token[:, None], token)
        if implementation == "eager":
            return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return seen

    def flex(self) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return self.sees(row, head, query, key)

        rows, tokens = self.shape_BT
        return create_block_mask(mask_mod, rows, None, tokens, tokens, device=str(self.document_BT.device))
