"""What a model's forward must be given so that packed documents stay apart, whichever attention it uses.

Ours and flash attention take the boundaries. sdpa and eager ignore them and need a (rows, 1, tokens, tokens) mask,
flex attention a block mask; a model that mixes full and sliding layers takes one of each, by layer type. Position ids
alone are not relied on: they isolate only under some implementations and only without a cache.

Since an implementation can ignore what it is given, it is tried on the model at hand: `prove_isolation` changes the
first of two packed documents and looks whether the second one notices, `prove_causality` the end of a row.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.models.attention import PACKED_ATTENTION, DocumentLayout
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.modes import eval_mode
from halfbyte.nn.vocabulary import unwrapped

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
    implementation = model.config._attn_implementation
    boundaries, layout = batch.get("cu_seq_lens"), batch.get("document_layout")
    if boundaries is None:
        if implementation != PACKED_ATTENTION:
            return inputs
        # Each row is a document: transformers, left alone, waits for the device to find out whether it is.
        rows, tokens = batch["input_ids"].shape
        device = batch["input_ids"].device
        boundaries = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device)
        layout = DocumentLayout(runs=((rows, tokens),), max_length=tokens)
    else:
        inputs["position_ids"] = batch["position_ids"]
    if implementation == PACKED_ATTENTION or "flash" in implementation:
        layout = layout or DocumentLayout.from_boundaries(boundaries.tolist())
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
    first, second = PROBE_LENGTHS
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None]
    boundaries = torch.tensor([0, first, first + second], dtype=torch.int32)
    packed = {"position_ids": positions, "cu_seq_lens": boundaries}
    if not _is_unmoved(model, packed, changed=slice(first), watched=slice(first, None)):
        raise ConfigError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets packed examples see "
            "each other (its layers carry state between tokens, or ignore document boundaries); set data.packing=false"
        )


def prove_causality(model: PreTrainedModel) -> None:
    """Make sure, by trying, that tokens of a padded batch are not influenced by what comes after them.

    Raises:
        ConfigError: They are.
    """
    first, _ = PROBE_LENGTHS
    if not _is_unmoved(model, {}, changed=slice(first, None), watched=slice(first)):
        raise ConfigError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets tokens see those after "
            "them; choose another model.attention"
        )


def read_hidden_states(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the decoder's last hidden states (rows, tokens, width), without the output head."""
    return model.base_model(**build_forward_inputs(model, batch)).last_hidden_state


@torch.no_grad()
def _is_unmoved(model: PreTrainedModel, batch: dict[str, torch.Tensor], *, changed: slice, watched: slice) -> bool:
    """Say whether the states of the watched tokens stay as they are when the changed ones become others."""
    embedding: Any = unwrapped(model.get_input_embeddings())
    num_words = embedding.weight.shape[0]
    ids = torch.arange(1, sum(PROBE_LENGTHS) + 1).remainder(num_words)[None]
    other = ids.clone()
    other[:, changed] = (ids[:, changed] * 7 + 5).remainder(num_words)
    states, device = [], compute_device_of(model)
    with eval_mode(model):
        for probe in (ids, other):
            inputs = {name: tensor.to(device) for name, tensor in {"input_ids": probe, **batch}.items()}
            states.append(read_hidden_states(model, inputs).float()[:, watched])
    change = (states[0] - states[1]).abs().max().item()
    # Kernels that order their sums by the whole batch may differ in the last bits; an influence is far larger.
    return change <= 8 * torch.finfo(compute_dtype_of(model)).eps * states[0].abs().max().item()


def compute_dtype_of(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the model's activations: what its embedding gives, which may be wider than what it holds."""
    # Not what is trained in its place, which is fp32 whatever the model computes in.
    embedding: Any = unwrapped(model.get_input_embeddings())
    dtype: torch.dtype = getattr(embedding, "compute_dtype", None) or embedding.weight.dtype
    return dtype


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
