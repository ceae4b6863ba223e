"""The loss of a causal language model from its hidden states, without whole logits.

    z = cap * tanh(scale * (h W' + b) / cap)      loss = sum of cross-entropies of the trained tokens / num_items

The decoder gives hidden states, and the head is applied to them in chunks (`halfbyte.ops.cross_entropy`). What a
model's own forward does between hidden states and logits is read from its config (Gemma's softcap, the scales of
Cohere, Granite and Falcon-H1) and from its head (bias); and because a config can say less than the code does, the
result is compared with the model's own logits on a few tokens before it is used. Where the two differ, the model's
own logits are taken whole, and `LossPath.note` says so.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.modes import eval_mode
from halfbyte.models.packed_inputs import build_forward_inputs, read_hidden_states
from halfbyte.nn.token_rows import RowsHead
from halfbyte.ops.cross_entropy import IGNORED_LABEL, OwnRows, chunked_cross_entropy, chunked_token_losses

PROBE_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadFormula:
    """What a model's config says about the way from the head's product to its logits."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits that follow from the head's product."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class LossPath:
    """Computes the loss of batches on one model, in the cheapest way that is proved to be right for it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.formula = read_head_formula(model)
        why_not = self._why_not_chunked()
        self.chunked = why_not is None
        self.note = (
            "loss: head in chunks, logits never whole"
            if why_not is None
            else f"loss: whole logits of every batch, which takes memory, because {why_not}"
        )

    def __call__(self, batch: Mapping[str, Any], *, num_items: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the summed cross-entropy of the trained tokens over `num_items`, by default their number.

        Args:
            batch: Tensors on the model's device; labels (rows, tokens) already shifted, -100 where not trained.
            num_items: Trained tokens of the whole accumulated batch.
        """
        labels_T = batch["labels"].flatten()
        if self.chunked:
            head = self._head_arguments()
            head |= {"num_items": num_items, "trained": batch.get("trained")}
            return chunked_cross_entropy(self._hidden(batch), head.pop("weight"), labels_T, **head)
        losses_T = self._losses_of_whole_logits(batch, labels_T)
        return losses_T.sum() / (max(int((labels_T != IGNORED_LABEL).sum()), 1) if num_items is None else num_items)

    @torch.no_grad()
    def sum_losses(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the summed cross-entropy of the trained tokens in fp64, for evaluation."""
        labels_T = batch["labels"].flatten()
        if not self.chunked:
            return self._losses_of_whole_logits(batch, labels_T).double().sum()
        head = self._head_arguments()
        return chunked_token_losses(self._hidden(batch), head.pop("weight"), labels_T, **head).double().sum()

    def _hidden(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return read_hidden_states(self.model, batch).flatten(0, 1)

    def _head_arguments(self) -> dict[str, Any]:
        head = self.model.get_output_embeddings()
        if isinstance(head, RowsHead):
            table = head.table
            rows = OwnRows(ids_N=table.ids_N, rows_ND=table.rows_ND, vocabulary=table.vocabulary)
            return self._head_options(head.original) | {"own_rows": rows}
        return self._head_options(head)

    def _head_options(self, head: Any) -> dict[str, Any]:
        return {
            "weight": head.weight,
            "head_bias": getattr(head, "bias", None),
            "softcap": self.formula.softcap,
            "logit_scale": self.formula.scale,
        }

    def _losses_of_whole_logits(self, batch: Mapping[str, Any], labels_T: torch.Tensor) -> torch.Tensor:
        logits_TV = self.model(**build_forward_inputs(self.model, batch)).logits.flatten(0, 1)
        return functional.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED_LABEL, reduction="none")

    @torch.no_grad()
    def _why_not_chunked(self) -> str | None:
        """Compare with the model's own logits on a few tokens; say what speaks against the formula, if anything."""
        model, head = self.model, self.model.get_output_embeddings()
        if head is None or model.base_model is model:
            return f"{type(model).__name__} does not show its output head"
        if not isinstance(getattr(head, "weight", None), torch.Tensor) or _has_adapter(head):
            return f"its output head is a {type(head).__name__}, not one product"
        weight = head.weight
        ids = torch.arange(3, 3 + PROBE_TOKENS, device=compute_device_of(model)).remainder(weight.shape[0])[None]
        with eval_mode(model):
            own = model(input_ids=ids, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        product = functional.linear(hidden, weight.to(hidden.dtype), None).float()
        if getattr(head, "bias", None) is not None:
            product += head.bias.float()
        ours = self.formula.apply(product)
        # The two round at different places: the product, its scale and its softcap, each in the compute dtype. Four
        # roundings of half an eps at most, uniformly spread, come to a root mean square below one eps.
        limit = torch.finfo(hidden.dtype).eps * own.norm()
        if own.shape != ours.shape or not bool((own - ours).norm() <= limit):
            return f"{type(model).__name__} turns hidden states into logits in a way that its config does not tell"
        return None


def read_head_formula(model: PreTrainedModel) -> HeadFormula:
    """Return what the config says: final_logit_softcapping, logit_scale, logits_scaling, lm_head_multiplier."""
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return HeadFormula(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def _has_adapter(head: nn.Module) -> bool:
    return any(name.startswith("lora_") for name, _ in head.named_parameters())
